"""The fast split, on any placement: all rows, only on replicas, and no worse than it has to be."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.ids import ExpertId, HostId
from expertmesh.levelling import Levels
from expertmesh.moe.split import split_rows
from expertmesh.placement import HostInfo, Placement, TimeModel


def placement_of(holders: list[list[int]], num_hosts: int) -> Placement:
    hosts = tuple(HostInfo(id=HostId(f"h{i}"), address="") for i in range(num_hosts))
    replicas = {ExpertId(0, e): tuple(hosts[h].id for h in of) for e, of in enumerate(holders)}
    return Placement(epoch=1, hosts=hosts, num_experts=(len(holders),), replicas=replicas)


@st.composite
def cases(draw):
    num_hosts = draw(st.integers(1, 6))
    holders = draw(st.lists(st.lists(st.integers(0, num_hosts - 1), min_size=1, unique=True), min_size=1, max_size=12))
    counts = st.one_of(st.integers(0, 40), st.integers(0, 5000))
    rows = draw(st.lists(counts, min_size=len(holders), max_size=len(holders)))
    busy = draw(st.lists(st.floats(0, 0.1), min_size=num_hosts, max_size=num_hosts))
    model = st.builds(TimeModel, st.floats(0, 1e-2), st.floats(1e-6, 1e-4), st.floats(0, 1e-3))
    models = draw(st.lists(model, min_size=num_hosts, max_size=num_hosts))
    return holders, np.array(rows), busy, models, draw(st.sampled_from([1, 4, 16]))


@settings(deadline=None)
@given(cases())
def test_rows_sum_and_only_replicas_get_any(case) -> None:
    holders, rows, busy, models, quantum = case
    table = placement_of(holders, len(models)).layers[0]
    before = rows.copy()
    counts = split_rows(rows, table, busy, models, quantum)
    assert counts.shape == table.host_EM.shape
    assert counts.dtype == np.int64
    assert (counts >= 0).all()
    assert counts.sum(axis=1).tolist() == rows.tolist() == before.tolist()
    assert not counts[np.arange(counts.shape[1])[None] >= table.num_replicas_E[:, None]].any()


@settings(deadline=None)
@given(cases())
def test_replicas_get_whole_chunks_but_one(case) -> None:
    holders, rows, busy, models, quantum = case
    counts = split_rows(rows, placement_of(holders, len(models)).layers[0], busy, models, quantum)
    for of, n in zip(counts.tolist(), rows.tolist(), strict=True):
        assert sum(count % quantum != 0 for count in of) <= 1
        assert sum(count > 0 for count in of) <= -(-n // quantum)


@settings(deadline=None)
@given(cases())
def test_equal_inputs_give_equal_splits(case) -> None:
    holders, rows, busy, models, quantum = case
    table = placement_of(holders, len(models)).layers[0]
    again = placement_of(holders, len(models)).layers[0]
    assert (split_rows(rows, table, busy, models, quantum) == split_rows(rows, again, busy, models, quantum)).all()


@settings(deadline=None)
@given(cases())
def test_the_slowest_host_is_at_most_some_chunks_over_the_optimum(case) -> None:
    """With no fixed costs: each expert may leave a chunk or two too many on a host."""
    holders, rows, _, models, quantum = case
    models = [TimeModel(row_s=model.row_s) for model in models]
    table = placement_of(holders, len(models)).layers[0]
    counts = split_rows(rows, table, [0.0] * len(models), models, quantum)
    rate = np.array([1 / model.row_s for model in models])
    work = np.bincount(table.host_EM.ravel(), counts.ravel(), len(models))
    levels = Levels(rows.tolist(), holders, [0.0] * len(models), rate.tolist())
    levels.settle()
    least = (np.array(levels.load) / rate).max()
    chunks = len(holders) * 2 * quantum
    assert (work / rate).max() <= least * 1.01 + chunks / rate.min()
