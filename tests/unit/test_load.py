"""The load meter against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from expertmesh.control.load import LoadMeter
from expertmesh.ids import ExpertId, HostId

A, B = HostId("a"), HostId("b")


def observe(meter: LoadMeter, host: HostId, at_s: float, rows_of: dict[tuple[int, int], int]) -> None:
    meter.observe(host, at_s, [(ExpertId(*expert), rows) for expert, rows in rows_of.items()])


def test_a_steady_load_is_shown_exactly_from_the_first_tick_on() -> None:
    meter = LoadMeter([2, 3])
    observe(meter, A, 0, {(1, 2): 0})
    meter.tick(0)
    for second in range(1, 50):
        observe(meter, A, second, {(1, 2): 70 * second})
        meter.tick(second)
        assert meter.loads() == [[0, 0], [0, 0, pytest.approx(70)]]


@pytest.mark.parametrize("after_s", [5.0, 20.0, 90.0])
def test_a_load_that_begins_is_half_there_after_a_half_life(after_s: float) -> None:
    meter = LoadMeter([1], half_life_s=20)
    meter.tick(0)
    meter.tick(10_000)
    for _ in range(100):
        meter.count(0, np.array([after_s]))  # 100 rows per second
    meter.tick(10_000 + after_s)
    assert meter.loads()[0][0] == pytest.approx(100 * (1 - 0.5 ** (after_s / 20)))


def test_a_load_that_ends_fades_by_half_in_each_half_life() -> None:
    meter = LoadMeter([1], half_life_s=20)
    meter.tick(0)
    meter.count(0, np.array([10_000 * 50]))
    meter.tick(10_000)
    for half_lives in range(1, 5):
        meter.tick(10_000 + 20 * half_lives)
        assert meter.loads()[0][0] == pytest.approx(50 * 0.5**half_lives)


def test_time_that_stands_still_or_goes_back_changes_nothing_and_loses_nothing() -> None:
    meter = LoadMeter([1])
    meter.tick(100)
    for now_s in (100, 90):
        meter.count(0, np.array([30]))
        meter.tick(now_s)
        assert meter.loads() == [[0]]
    meter.tick(101)
    assert meter.loads() == [[pytest.approx(60)]]


def test_what_hosts_did_before_they_were_first_seen_is_no_load() -> None:
    meter = LoadMeter([2])
    meter.tick(0)
    observe(meter, A, 1000, {(0, 0): 10**9})
    meter.tick(1)
    assert meter.loads() == [[0, 0]]


def test_a_replica_that_appears_or_was_loaded_anew_counts_from_zero() -> None:
    meter = LoadMeter([3])
    meter.tick(0)
    observe(meter, A, 0, {(0, 0): 500})
    observe(meter, A, 1, {(0, 0): 40, (0, 1): 7})
    meter.tick(1)
    assert meter.loads() == [[pytest.approx(40), pytest.approx(7), 0]]


def test_the_replicas_of_an_expert_add_up() -> None:
    meter = LoadMeter([1])
    meter.tick(0)
    for host in (A, B):
        observe(meter, host, 0, {(0, 0): 5})
        observe(meter, host, 1, {(0, 0): 15})
    meter.tick(1)
    assert meter.loads() == [[pytest.approx(20)]]
