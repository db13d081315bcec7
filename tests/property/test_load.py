"""Whatever happens to the reports on their way, the meter ends up where one that got them all is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.control.load import LoadMeter
from expertmesh.ids import ExpertId, HostId

HOST, EXPERT = HostId("h"), ExpertId(0, 0)


def meter_of(reports: list[tuple[int, int]], steady: int) -> LoadMeter:
    """A meter that saw `reports` (second, rows so far) in this order, and then a steady load for 20 half-lives."""
    meter = LoadMeter([1], half_life_s=10)
    meter.tick(0)
    meter.observe(HOST, 0, [(EXPERT, 0)])
    for second, rows in reports:
        meter.observe(HOST, second, [(EXPERT, rows)])
        meter.tick(second)
    last_s, last_rows = max(reports)
    for i in range(1, 201):
        meter.observe(HOST, last_s + i, [(EXPERT, last_rows + steady * i)])
        meter.tick(last_s + i)
    return meter


@given(
    st.lists(st.integers(0, 10_000), min_size=1, max_size=12).flatmap(
        lambda steps: st.tuples(st.just(steps), st.lists(st.integers(0, len(steps) - 1), max_size=30))
    ),
    st.integers(0, 1000),
)
def test_lost_repeated_and_reordered_reports_change_nothing_in_the_end(history, steady) -> None:
    steps, arriving = history
    sent = [(second, sum(steps[:second])) for second in range(1, len(steps) + 1)]
    arrived = [*(sent[i] for i in arriving), sent[-1]]
    # What is left of any difference is at most all rows, after 20 half-lives.
    assert meter_of(arrived, steady).loads()[0][0] == pytest.approx(meter_of(sent, steady).loads()[0][0], abs=0.05)
    assert meter_of(arrived, steady).loads()[0][0] == pytest.approx(steady, abs=0.05)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000)), min_size=2, max_size=20), st.randoms())
def test_every_row_is_counted_once_whatever_is_lost_repeated_or_reordered(steps, random) -> None:
    """With a half-life beyond all measure, the load is all rows over all seconds."""
    meter = LoadMeter([1], half_life_s=1e12)
    meter.observe(HOST, 0, [(EXPERT, 0)])
    meter.tick(0)
    sent, second, rows = [], 0, 0
    for seconds, more in steps:
        second, rows = second + seconds, rows + more
        sent.append((second, rows))
    arriving = [*random.choices(sent, k=len(sent)), sent[-1]]
    for at_s, so_far in arriving:
        meter.observe(HOST, at_s, [(EXPERT, so_far)])
        meter.tick(random.uniform(0, second))
    meter.tick(second + 1)
    assert meter.loads()[0][0] * (second + 1) == pytest.approx(rows, rel=1e-6, abs=1e-6)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=10), st.integers(0, 1000))
def test_how_often_one_ticks_makes_no_difference_to_a_steady_load(gaps_s, per_second) -> None:
    often, once = (LoadMeter([1], half_life_s=7) for _ in range(2))
    for meter in (often, once):
        meter.tick(0)
        meter.tick(5)
    now_s = 5
    for gap_s in gaps_s:
        now_s += gap_s
        often.count(0, np.array([per_second * gap_s]))
        often.tick(now_s)
    once.count(0, np.array([per_second * (now_s - 5)]))
    once.tick(now_s)
    assert often.loads()[0][0] == pytest.approx(once.loads()[0][0], rel=1e-9)
