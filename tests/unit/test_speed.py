"""Time models against the launches that made the counters, and an independent least-squares solver."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import nnls

from expertmesh.control.speed import MIN_LAUNCHES, SpeedMeter, fit
from expertmesh.hosts.statistics import LaunchCounter, LaunchSums
from expertmesh.ids import HostId
from expertmesh.placement import TimeModel

A, B, C = HostId("a"), HostId("b"), HostId("c")
TRUE = TimeModel(launch_s=0.002, row_s=0.0001, expert_s=0.0005)
MIXED = [(1 + i % 7, 8 + i * 37 % 64) for i in range(60)]


def launched(launches: list[tuple[int, int]], model: TimeModel, factor: float = 1.0) -> LaunchSums:
    """What a host counts that made launches of (experts, rows)."""
    counter = LaunchCounter()
    for experts, rows in launches:
        counter.add(experts, rows, factor * model.seconds(rows, experts))
    return counter.sums()


def close(model: TimeModel | None, to: TimeModel) -> bool:
    assert model is not None
    pairs = zip((model.launch_s, model.row_s, model.expert_s), (to.launch_s, to.row_s, to.expert_s), strict=True)
    return all(a == pytest.approx(b, rel=1e-6, abs=1e-12) for a, b in pairs)


def test_the_model_is_the_one_that_the_launches_follow() -> None:
    assert close(fit(launched(MIXED, TRUE)), TRUE)


@pytest.mark.parametrize("seed", range(30))
def test_noisy_launches_are_explained_as_well_as_can_be_without_negative_figures(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, rows = rng.integers(1, 9, 200), rng.integers(8, 200, 200)
    terms = np.stack([np.ones(200), rows, experts], axis=1)
    took_s = np.maximum(1e-5, terms @ rng.normal(0, [1e-3, 1e-4, 1e-3]) + rng.normal(0, 1e-3, 200))
    counter = LaunchCounter()
    for e, r, s in zip(experts.tolist(), rows.tolist(), took_s.tolist(), strict=True):
        counter.add(e, r, s)
    model = fit(counter.sums())
    assert model is not None
    figures = np.array([model.launch_s, model.row_s, model.expert_s])
    assert (figures >= 0).all()
    _, residual = nnls(terms, took_s)
    # Terms that explain next to nothing are left out.
    assert np.linalg.norm(terms @ figures - took_s) <= np.sqrt(residual**2 + 3e-3 * (took_s @ took_s))


def test_what_never_varied_is_put_down_to_rows() -> None:
    assert close(fit(launched([(4, 20)] * 30, TRUE)), TimeModel(0.0, TRUE.seconds(20, 4) / 20, 0.0))


def test_a_few_launches_are_no_measurement() -> None:
    meter = SpeedMeter()
    meter.observe(A, "pool", 0, LaunchSums())
    meter.observe(A, "pool", 1, launched(MIXED[: MIN_LAUNCHES - 1], TRUE))
    assert meter.time_model(A) is None
    assert meter.rate(A) == 1.0


def test_alike_hosts_with_unlike_work_are_equally_fast() -> None:
    """One gets many rows for one expert, the other a few for each of many: rows per second differ, devices do not."""
    meter = SpeedMeter()
    for host, work in ((A, [(1, 24), (2, 40)] * 20), (B, [(6, 24), (5, 10)] * 20)):
        meter.observe(host, "pool", 0, LaunchSums())
        meter.observe(host, "pool", 1, launched(work, TRUE))
    assert meter.rate(A) == pytest.approx(meter.rate(B))
    assert close(meter.time_model(A), TRUE)


def test_a_slower_host_of_a_pool_is_seen_by_its_factor() -> None:
    meter = SpeedMeter()
    for at_s in (0, 1, 2):
        for host, factor in ((A, 1.0), (B, 3.0)):
            meter.observe(host, "pool", at_s, launched(MIXED * at_s, TRUE, factor))
    assert meter.rate(A) / meter.rate(B) == pytest.approx(3.0)


def test_hosts_of_a_pool_that_differ_a_little_are_taken_to_be_alike() -> None:
    """Until one differs much, and then until it is nearly like the others again."""
    meter = SpeedMeter(window_s=1)
    busy, ratios = {A: LaunchSums(), B: LaunchSums(), C: LaunchSums()}, []
    for at_s, factor in enumerate([1.0, 1.2, 1.2, 1.7, 1.7, 1.3, 1.3, 1.05, 1.05], start=1):
        for host in busy:
            sums = launched(MIXED, TRUE, factor if host == C else 1.0)
            busy[host] = busy[host].plus(sums)
            meter.observe(host, "pool", at_s, busy[host])
        ratios.append(meter.rate(A) / meter.rate(C))
    assert ratios[:3] == [1.0] * 3
    assert all(ratio > 1.15 for ratio in ratios[4:7])
    assert ratios[-1] == 1.0


def test_pools_have_models_of_their_own() -> None:
    other = TimeModel(launch_s=0.0001, row_s=0.00002, expert_s=0.00001)
    meter = SpeedMeter()
    for host, pool, model in ((A, "cpu", TRUE), (B, "gpu", other)):
        meter.observe(host, pool, 0, LaunchSums())
        meter.observe(host, pool, 1, launched(MIXED, model))
    assert close(meter.time_model(A), TRUE)
    assert close(meter.time_model(B), other)


def test_an_unmeasured_host_is_as_fast_as_its_pool_or_else_as_the_median() -> None:
    meter = SpeedMeter()
    meter.observe(A, "pool", 0, LaunchSums())
    meter.observe(A, "pool", 1, launched(MIXED, TRUE))
    meter.observe(B, "pool", 0, LaunchSums())
    meter.observe(C, "another", 0, LaunchSums())
    assert close(meter.time_model(B), TRUE)
    assert meter.time_model(C) is None
    assert meter.rate(C) == pytest.approx(meter.rate(A))


def test_old_launches_are_forgotten_and_late_reports_ignored() -> None:
    meter = SpeedMeter(window_s=10)
    slow, then = launched(MIXED, TRUE, 5.0), launched(MIXED, TRUE)
    both = slow.plus(then)
    meter.observe(A, "pool", 0, LaunchSums())
    meter.observe(A, "pool", 1, slow)
    meter.observe(A, "pool", 20, slow)
    meter.observe(A, "pool", 31, both)
    meter.observe(A, "pool", 5, LaunchSums())
    assert close(meter.time_model(A), TRUE)


def test_a_host_that_counts_from_zero_again_is_measured_anew() -> None:
    meter = SpeedMeter()
    meter.observe(A, "pool", 0, LaunchSums())
    meter.observe(A, "pool", 1, launched(MIXED * 2, TRUE, 5.0))
    meter.observe(A, "pool", 2, LaunchSums())
    meter.observe(A, "pool", 3, launched(MIXED, TRUE))
    assert close(meter.time_model(A), TRUE)


def test_rows_always_cost_something() -> None:
    """Measured noise may say that more rows take no longer; a split by finish times needs more than nothing."""
    model = fit(launched(MIXED, TimeModel(launch_s=0.002, row_s=0.0, expert_s=0.001)))
    assert model is not None
    assert 0 < model.row_s * 72 < 0.01 * model.seconds(72, 7)
