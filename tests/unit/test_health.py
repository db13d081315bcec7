"""Whom a router trusts: late twice, shunned; probes in time, trusted again; slow devices are left alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from expertmesh.ids import HostId
from expertmesh.moe.health import Health, HealthOptions, Trust

A, B = HostId("a"), HostId("b")
OPTIONS = HealthOptions()


def settled(took_s: float, host: HostId = A, pairs: int = 8) -> Health:
    """A host that has always taken so long."""
    health = Health(OPTIONS)
    for _ in range(500):
        health.answered(host, pairs, took_s, now=0.0)
    return health


def test_the_usual_time_is_the_quantile_of_what_was_measured() -> None:
    rng = random.Random(3)
    times = [rng.lognormvariate(-3.0, 0.6) for _ in range(20_000)]
    health = Health(HealthOptions(late_factor=1.0, late_least_s=0.0))
    usual = []
    for took_s in times:
        health.answered(A, 8, took_s, now=0.0)
        usual.append(health.late_after_s(A, 8))
    assert np.mean(usual[2000:]) == pytest.approx(np.quantile(times, OPTIONS.quantile), rel=0.15)


def test_a_host_that_was_never_heard_gets_time() -> None:
    assert Health(OPTIONS).late_after_s(A, 8) == OPTIONS.late_unknown_s


def test_larger_requests_may_take_longer_in_proportion() -> None:
    health = settled(0.05, pairs=8)
    assert health.late_after_s(A, 8 * 16) == pytest.approx(16 * health.late_after_s(A, 8))
    assert health.late_after_s(A, 1) == health.late_after_s(A, 8)


def test_two_misses_in_a_row_cost_the_trust_and_one_does_not() -> None:
    health = settled(0.05)
    health.missed(A, now=1.0)
    health.answered(A, 8, 0.05, now=1.1)
    health.missed(A, now=1.2)
    assert health.trust(A) is Trust.TRUSTED
    health.missed(A, now=1.3)
    assert health.trust(A) is Trust.SHUNNED
    assert health.avoided == {A}


def test_a_broken_link_costs_it_at_once() -> None:
    health = settled(0.05)
    health.broke(A, now=1.0)
    assert health.avoided == {A}
    assert health.to_probe(1.0 + OPTIONS.shun_first_s - 0.01) == []
    assert health.to_probe(1.0 + OPTIONS.shun_first_s) == [A]


def test_probes_in_time_bring_it_back() -> None:
    health = settled(0.05)
    health.broke(A, now=0.0)
    now = OPTIONS.shun_first_s
    for _ in range(OPTIONS.probes_to_pass):
        assert health.avoided == {A}
        assert health.to_probe(now) == [A]
        assert health.to_probe(now + OPTIONS.probe_every_s / 2) == []
        health.probed(A, 8, 0.05, now)
        now += OPTIONS.probe_every_s + 1e-6
    assert health.trust(A) is Trust.TRUSTED
    assert health.avoided == frozenset()


@pytest.mark.parametrize("took_s", [None, 5.0])
def test_a_failed_probe_doubles_the_wait(took_s: float | None) -> None:
    health = settled(0.05)
    health.broke(A, now=0.0)
    now, waits = 0.0, []
    for _ in range(9):
        began = now
        while not health.to_probe(now):
            now += 0.01
        waits.append(now - began)
        health.probed(A, 8, took_s, now)
    expected = [min(OPTIONS.shun_longest_s, OPTIONS.shun_first_s * 2**i) for i in range(9)]
    assert waits == pytest.approx(expected, abs=0.02)


def test_a_host_that_keeps_failing_is_tried_ever_less_often_and_one_that_does_well_is_forgiven() -> None:
    health = settled(0.05)

    def back_after(now: float) -> float:
        """Break it at `now`, and answer all probes in time: when it is trusted again."""
        health.broke(A, now)
        while health.avoided:
            now += 0.01
            if health.to_probe(now):
                health.probed(A, 8, 0.05, now)
        return now

    first = back_after(0.0)
    second = back_after(first + 1.0) - (first + 1.0)
    assert second > first + 0.9 * OPTIONS.shun_first_s
    later = first + second + 2 * OPTIONS.forgive_s
    health.answered(A, 8, 0.05, later)
    assert back_after(later) - later == pytest.approx(first, abs=0.1)


def test_a_host_that_has_become_somewhat_slower_is_accepted_after_a_while() -> None:
    health = settled(0.05)
    health.missed(A, 0.0)
    health.missed(A, 0.0)
    now = 0.0
    while health.avoided:
        now += 0.05
        assert now < 60.0
        if health.to_probe(now):
            health.probed(A, 8, 0.2, now)
    assert health.late_after_s(A, 8) > 0.2


def test_hosts_that_are_gone_are_forgotten() -> None:
    health = settled(0.05)
    health.broke(A, 0.0)
    health.broke(B, 0.0)
    health.keep_only({B})
    assert health.avoided == {B}
    assert health.late_after_s(A, 8) == OPTIONS.late_unknown_s


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens: who is avoided is not trusted, nobody is avoided without end, probes keep their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.health = Health(OPTIONS)
        self.now = 0.0
        self.probed_at: dict[HostId, float] = {}

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(host=st.sampled_from([A, B]), pairs=st.integers(1, 500), took_s=st.floats(1e-4, 10))
    def answers(self, host: HostId, pairs: int, took_s: float) -> None:
        self.health.answered(host, pairs, took_s, self.now)

    @rule(host=st.sampled_from([A, B]))
    def misses(self, host: HostId) -> None:
        self.health.missed(host, self.now)

    @rule(host=st.sampled_from([A, B]))
    def breaks(self, host: HostId) -> None:
        self.health.broke(host, self.now)

    @rule(took_s=st.none() | st.floats(1e-4, 10), pairs=st.integers(1, 500))
    def is_probed(self, took_s: float | None, pairs: int) -> None:
        for host in self.health.to_probe(self.now):
            assert self.now - self.probed_at.get(host, -1.0) >= OPTIONS.probe_every_s
            self.probed_at[host] = self.now
            self.health.probed(host, pairs, took_s, self.now)

    @invariant()
    def avoided_are_those_not_trusted(self) -> None:
        hosts = (A, B)
        assert self.health.avoided == {host for host in hosts if self.health.trust(host) is not Trust.TRUSTED}

    def teardown(self) -> None:
        """However it was treated, a host that does well from now on is trusted in the end."""
        self.now += OPTIONS.shun_longest_s
        for _ in range(OPTIONS.probes_to_pass):
            self.now += OPTIONS.probe_every_s + 1e-6
            for host in self.health.to_probe(self.now):
                self.health.probed(host, 8, 1e-5, self.now)
        assert not self.health.avoided


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
