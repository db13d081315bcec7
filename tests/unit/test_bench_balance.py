"""The balance bench: its bounds are bounds, its figures are what the project promises."""

from __future__ import annotations

import json

import numpy as np
import pytest

from expertmesh.bench import balance, planner
from expertmesh.bench.balance import CASES, EPLB, NONE, OURS, PLACEMENT_BOUND, SPLIT_BOUND, Case, compare
from expertmesh.bench.balance_sides import EvenSplit, Ours, ideal_time, least_time
from expertmesh.control.planner import HostSupply
from expertmesh.ids import HostId

TARGETS = {CASES[0]: 1.02, CASES[1]: 1.16, CASES[2]: 1.02, CASES[3]: 1.25}


@pytest.fixture(scope="module")
def report():
    return balance.run(seeds=20, plans=10)


def test_the_report_is_json_and_says_what_was_measured(report) -> None:
    assert json.loads(json.dumps(report)) == report
    assert report["landing_slots"] == 0
    assert report["environment"]["command"] == "expertmesh bench balance --json"


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_the_slowest_host_is_within_the_target_and_ahead_of_eplb(report, number) -> None:
    mean = report["cases"][number]["mean"]
    assert mean[OURS] <= TARGETS[CASES[number]]
    assert mean[PLACEMENT_BOUND] <= mean[SPLIT_BOUND] <= mean[OURS] <= mean[SPLIT_BOUND] * 1.005
    assert mean[OURS] < mean[EPLB] < mean[NONE]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_under_a_wandering_load_it_is_never_slower_than_eplb_and_moves_less(report, number) -> None:
    wandering = report["wandering"][number]
    assert wandering["slower_than_eplb"] == 0
    assert wandering["bytes_moved"][OURS] < wandering["bytes_moved"][EPLB] / 10


def test_no_placement_beats_its_bound() -> None:
    """One expert has nearly all the load; with one spare slot it can be on two hosts."""
    inventory = [HostSupply(host=HostId(f"h{i}"), slots=2 if i else 1) for i in range(4)]
    rows = np.array([900, 20, 20, 20, 20, 20])
    assert ideal_time(rows, inventory) == 250
    assert least_time(rows, inventory) == 450
    ours = Ours(inventory)
    ours.plan([rows])
    assert ours.least_time(0, rows) == pytest.approx(460), "one of the two has a second slot, and it is needed"


def test_an_even_split_counts_moves_and_time_by_hand() -> None:
    inventory = [HostSupply(host=HostId("a"), slots=2), HostSupply(host=HostId("b"), slots=2, rate=0.5)]
    dealt = EvenSplit(inventory, replicates=False)
    assert dealt.plan([[1, 1, 1, 1]]) == 4
    assert dealt.plan([[9, 1, 1, 1]]) == 0
    assert dealt.time(0, np.array([1, 2, 3, 4])) == 14
    balanced = EvenSplit(inventory, replicates=True)
    assert balanced.plan([[8, 1, 1]]) == 4
    assert balanced.time(0, np.array([8, 1, 1])) == 10


def test_several_layers_and_windows_are_compared_row_by_row() -> None:
    case = Case(experts=8, hosts=4, spare=4)
    rng = np.random.default_rng(0)
    windows = [[rng.exponential(size=8), rng.exponential(size=8)] for _ in range(4)]
    inventory = [HostSupply(host=supply.host, slots=6) for supply in case.inventory()]
    rows = compare(windows, inventory)
    assert len(rows) == 3
    assert all(row[side]["time"] >= 1 for row in rows for side in (EPLB, OURS))
    assert rows[0][EPLB]["moves"] <= 24
    assert rows[0][OURS]["moves"] <= 24


def test_the_planner_bench_times_three_kinds_of_plans() -> None:
    report = planner.run(repeats=1, sizes=[(2, 16, 4)])
    assert set(report["sizes"][0]["milliseconds"]) == {"first", "drifted", "unchanged"}
    assert all(value > 0 for value in report["sizes"][0]["milliseconds"].values())
