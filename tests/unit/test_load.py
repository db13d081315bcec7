"""The load meter: smoothing against closed forms, time models against the launches that made the counters."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy.optimize import nnls

from expertmesh.control.load import MIN_LAUNCHES, LoadMeter
from expertmesh.ids import ExpertId, HostId

A, B = HostId("a"), HostId("b")


@dataclass(kw_only=True)
class Counting:
    """A host that counts its launches, as hosts do."""

    at_s: float = 0.0
    rows_of: dict[ExpertId, int] = field(default_factory=dict)
    launches: int = 0
    rows: int = 0
    rows_squared: int = 0
    busy_s: float = 0.0
    rows_busy_s: float = 0.0

    @property
    def replicas(self) -> tuple[tuple[ExpertId, int], ...]:
        return tuple(self.rows_of.items())

    def launch(self, rows: int, took_s: float) -> None:
        self.launches += 1
        self.rows += rows
        self.rows_squared += rows * rows
        self.busy_s += took_s
        self.rows_busy_s += rows * took_s


def report(at_s: float, rows_of: dict[tuple[int, int], int]) -> Counting:
    return Counting(at_s=at_s, rows_of={ExpertId(*expert): rows for expert, rows in rows_of.items()})


def test_a_steady_load_is_shown_exactly_from_the_first_tick_on() -> None:
    meter = LoadMeter([2, 3])
    meter.observe(A, report(0, {(1, 2): 0}))
    meter.tick(0)
    for second in range(1, 50):
        meter.observe(A, report(second, {(1, 2): 70 * second}))
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
    meter.observe(A, report(1000, {(0, 0): 10**9}))
    meter.tick(1)
    assert meter.loads() == [[0, 0]]


def test_a_replica_that_appears_or_was_loaded_anew_counts_from_zero() -> None:
    meter = LoadMeter([3])
    meter.tick(0)
    meter.observe(A, report(0, {(0, 0): 500}))
    meter.observe(A, report(1, {(0, 0): 40, (0, 1): 7}))
    meter.tick(1)
    assert meter.loads() == [[pytest.approx(40), pytest.approx(7), 0]]


def test_the_replicas_of_an_expert_add_up() -> None:
    meter = LoadMeter([1])
    meter.tick(0)
    for host in (A, B):
        meter.observe(host, report(0, {(0, 0): 5}))
        meter.observe(host, report(1, {(0, 0): 15}))
    meter.tick(1)
    assert meter.loads() == [[pytest.approx(20)]]


def test_the_time_model_is_the_line_that_the_launches_lie_on() -> None:
    meter, host = LoadMeter([1]), Counting()
    meter.observe(A, host)
    for i in range(40):
        rows = 1 + i * 37 % 64
        host.launch(rows, 0.002 + 0.0001 * rows)
    host.at_s = 1
    meter.observe(A, host)
    model = meter.time_model(A)
    assert model.launch_s == pytest.approx(0.002)
    assert model.row_s == pytest.approx(0.0001)
    assert meter.rate(A, 100) == pytest.approx(100 / 0.012)


@pytest.mark.parametrize("seed", range(20))
def test_the_time_model_is_the_best_one_without_negative_figures(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 50, 30)
    took_s = np.maximum(1e-4, rng.normal(0, 0.003) + rows * rng.normal(0, 1e-4) + rng.normal(0, 1e-3, 30))
    meter, host = LoadMeter([1]), Counting()
    meter.observe(A, host)
    for n, s in zip(rows.tolist(), took_s.tolist(), strict=True):
        host.launch(n, s)
    host.at_s = 1
    meter.observe(A, host)
    best, _ = nnls(np.stack([np.ones(30), rows], axis=1), took_s)
    model = meter.time_model(A)
    assert (model.launch_s, model.row_s) == pytest.approx(tuple(best), rel=1e-6, abs=1e-12)


def test_launches_of_one_size_put_all_time_down_to_rows_until_the_split_was_once_seen() -> None:
    meter, host = LoadMeter([1], model_window_s=10), Counting()
    meter.observe(A, host)

    def observe(at_s: float, sizes: list[int], slower: float) -> None:
        for rows in sizes:
            host.launch(rows, slower * (0.004 + 0.0001 * rows))
        host.at_s = at_s
        meter.observe(A, host)

    observe(1, [20] * 30, 1.0)
    assert meter.time_model(A).launch_s == 0
    assert meter.rate(A, 20) == pytest.approx(20 / 0.006)
    observe(2, [10, 40] * 30, 1.0)
    assert meter.time_model(A).launch_s == pytest.approx(0.004)
    observe(50, [], 1.0)
    observe(51, [20] * 30, 3.0)
    observe(70, [20] * 30, 3.0)
    assert meter.time_model(A).launch_s == pytest.approx(0.012)
    assert meter.rate(A, 20) == pytest.approx(20 / 0.018)


def test_a_few_launches_are_no_measurement() -> None:
    meter, host = LoadMeter([1]), Counting()
    meter.observe(A, host)
    for _ in range(MIN_LAUNCHES - 1):
        host.launch(10, 0.1)
    host.at_s = 1
    meter.observe(A, host)
    assert meter.time_model(A) is None
    assert meter.rate(A, 10) == 1.0


def test_an_unmeasured_host_is_taken_for_the_median_of_the_measured() -> None:
    meter = LoadMeter([1])
    for name, row_s in (("x", 0.001), ("y", 0.002), ("z", 0.1)):
        host = Counting()
        meter.observe(HostId(name), host)
        for _ in range(MIN_LAUNCHES):
            host.launch(10, row_s * 10)
        host.at_s = 1
        meter.observe(HostId(name), host)
    assert meter.rate(HostId("new"), 10) == pytest.approx(500)
    assert meter.batch_rows() == pytest.approx(10)
    meter.forget(HostId("z"))
    assert meter.rate(HostId("new"), 10) == pytest.approx(750)


def test_a_host_that_was_configured_anew_is_measured_anew() -> None:
    meter, host = LoadMeter([1]), Counting()
    meter.observe(A, host)
    for _ in range(100):
        host.launch(10, 0.01)
    host.at_s = 1
    meter.observe(A, host)
    again = Counting(at_s=2)
    meter.observe(A, again)
    for _ in range(50):
        again.launch(10, 0.05)
    again.at_s = 3
    meter.observe(A, again)
    assert meter.rate(A, 10) == pytest.approx(200)
