"""The fast split: levels finish times, keeps few rows together, and beats an even split."""

from __future__ import annotations

import time

import numpy as np
import pytest

from expertmesh.bench.balance import CASES, DRIFT, batch, zipf
from expertmesh.bench.balance_sides import Ours, ideal_time
from expertmesh.ids import ExpertId, HostId
from expertmesh.moe.split import split_rows
from expertmesh.placement import HostInfo, LayerTable, Placement, TimeModel

ALIKE = [TimeModel(), TimeModel(), TimeModel()]


def table_of(*holders: str) -> LayerTable:
    """One string for each expert, a letter for each host: "ab" is on a and b."""
    hosts = tuple(HostInfo(id=HostId(name), address="") for name in "abc")
    replicas = {ExpertId(0, e): tuple(HostId(name) for name in of) for e, of in enumerate(holders)}
    return Placement(epoch=1, hosts=hosts, num_experts=(len(holders),), replicas=replicas).layers[0]


def test_an_expert_with_one_replica_is_fixed_and_others_make_up_for_it() -> None:
    counts = split_rows(np.array([60, 100]), table_of("a", "ab"), [0, 0, 0], ALIKE, quantum=1)
    assert counts.tolist() == [[60, 0], [20, 80]]


def test_rows_go_by_speed() -> None:
    models = [TimeModel(row_s=1), TimeModel(row_s=3), TimeModel()]
    assert split_rows(np.array([100]), table_of("ab"), [0, 0, 0], models, quantum=1).tolist() == [[75, 25]]


def test_a_host_that_is_busy_gets_less() -> None:
    assert split_rows(np.array([100]), table_of("ab"), [50, 0, 0], ALIKE, quantum=1).tolist() == [[25, 75]]


def test_a_launch_counts_once_for_each_host() -> None:
    models = [TimeModel(launch_s=20), TimeModel(), TimeModel()]
    assert split_rows(np.array([100]), table_of("ab"), [0, 0, 0], models, quantum=1).tolist() == [[40, 60]]


def test_reading_the_weights_of_experts_that_a_host_has_anyway_counts() -> None:
    models = [TimeModel(expert_s=10), TimeModel(expert_s=10), TimeModel()]
    counts = split_rows(np.array([5, 5, 8]), table_of("a", "a", "ab"), [0, 0, 0], models)
    assert counts.tolist() == [[5, 0], [5, 0], [0, 8]]


def test_rows_flow_through_other_experts() -> None:
    """c is relieved by b, which only can when its other expert goes to a."""
    counts = split_rows(np.array([30, 120]), table_of("ab", "bc"), [0, 0, 0], ALIKE, quantum=1)
    assert counts.tolist() == [[30, 0], [60, 60]]
    counts = split_rows(np.array([30, 120, 60]), table_of("a", "ab", "bc"), [0, 0, 0], ALIKE, quantum=1)
    assert counts.tolist() == [[30, 0], [45, 75], [0, 60]]


def test_few_rows_are_not_split() -> None:
    counts = split_rows(np.array([16, 16, 5]), table_of("abc", "abc", "abc"), [0, 0, 0], ALIKE)
    assert sorted(counts.max(axis=1).tolist()) == [5, 16, 16]
    assert (counts.sum(axis=0) > 0).all(), "each expert is on a host of its own"


def test_no_rows_and_no_choice_are_no_work() -> None:
    assert split_rows(np.array([0, 0]), table_of("ab", "c"), [0, 0, 0], ALIKE).tolist() == [[0, 0], [0, 0]]
    assert split_rows(np.array([7, 9]), table_of("a", "c"), [0, 0, 0], ALIKE).tolist() == [[7], [9]]


def test_an_expert_without_rows_needs_no_replica() -> None:
    assert split_rows(np.array([0, 9]), table_of("", "ab"), [0, 0, 0], ALIKE)[0].sum() == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_big_batch_is_within_half_a_percent_of_the_optimum_and_beats_an_even_split(case) -> None:
    inventory = case.inventory()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        loads = zipf(case.experts, rng)
        rows = batch(loads * rng.lognormal(0, DRIFT, case.experts))
        ours = Ours(inventory)
        ours.plan([loads])
        reached = ours.time(0, rows)
        assert reached <= ours.least_time(0, rows) * 1.005
        table = ours.table(0)
        even = rows / table.num_replicas_E
        has = np.arange(table.host_EM.shape[1]) < table.num_replicas_E[:, None]
        work = np.bincount(table.host_EM[has], np.broadcast_to(even[:, None], has.shape)[has], len(inventory))
        assert reached < max(work / [supply.rate for supply in inventory])
        assert reached >= ideal_time(rows, inventory)


def test_a_split_takes_no_time_to_speak_of() -> None:
    """Loose, for machines that are busy with other things; the figure is in the planner's bench."""
    case = CASES[1]
    rng = np.random.default_rng(0)
    loads = zipf(case.experts, rng)
    ours = Ours(case.inventory())
    ours.plan([loads])
    rows = batch(loads)
    least = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        ours.time(0, rows)
        least = min(least, time.perf_counter() - started)
    assert least < 5e-3
