"""A dispatch plan loses no pair and invents none, whatever the placement."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.errors import NoReadyReplicaError
from expertmesh.ids import ExpertId, HostId
from expertmesh.moe.dispatch import make_dispatch_plan
from expertmesh.moe.loops import loops
from expertmesh.moe.split import split_rows
from expertmesh.placement import HostInfo, Placement, TimeModel

loops()  # to compile them takes longer than an example may


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    num_hosts = draw(st.integers(1, 5))
    num_experts = draw(st.integers(1, 9))
    hosts = tuple(HostInfo(id=HostId(f"h{i}"), address=f"h{i}:1") for i in range(num_hosts))
    ids = st.lists(st.sampled_from([host.id for host in hosts]), min_size=1, unique=True)
    replicas = {ExpertId(0, e): tuple(draw(ids)) for e in range(num_experts)}
    return Placement(epoch=1, hosts=hosts, num_experts=(num_experts,), replicas=replicas)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Placement, np.ndarray, int, np.ndarray]:
    placement = draw(placements())
    num_choices = draw(st.integers(1, 4))
    num_tokens = draw(st.integers(1, 12))
    size = num_tokens * num_choices
    experts = draw(st.lists(st.integers(0, placement.num_experts[0] - 1), min_size=size, max_size=size))
    pairs = draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True))
    return placement, np.array(experts), num_choices, np.array(pairs)


@given(cases())
def test_every_pair_is_in_exactly_one_part_and_reaches_its_expert(case) -> None:
    placement, expert_P, num_choices, pairs = case
    parts = make_dispatch_plan(placement, 0, expert_P, num_choices, pairs)
    assert sorted(np.concatenate([part.pairs for part in parts])) == sorted(pairs)
    assert len({part.host.id for part in parts}) == len(parts)
    for part in parts:
        wanted = np.repeat(part.experts, part.counts)
        assert wanted.tolist() == expert_P[part.pairs].tolist()
        assert all(part.host.id in placement.replicas[ExpertId(0, e)] for e in part.experts)
        assert len(set(part.experts)) == len(part.experts)


@given(cases())
def test_each_token_row_travels_once_to_a_host_and_every_pair_finds_it(case) -> None:
    placement, expert_P, num_choices, pairs = case
    for part in make_dispatch_plan(placement, 0, expert_P, num_choices, pairs):
        assert (np.diff(part.tokens) > 0).all()
        assert part.tokens[part.pair_rows].tolist() == (part.pairs // num_choices).tolist()
        assert set(part.pair_rows) == set(range(len(part.tokens)))


@given(cases())
def test_replicas_of_an_expert_get_the_pairs_that_the_split_gives_them(case) -> None:
    placement, expert_P, num_choices, pairs = case
    table = placement.layers[0]
    rows_E = np.bincount(expert_P[pairs], minlength=len(table.num_replicas_E))
    counts_EM = split_rows(rows_E, table, [0.0] * len(placement.hosts), placement.time_models)
    parts = {part.host.id: part for part in make_dispatch_plan(placement, 0, expert_P, num_choices, pairs)}
    for (_, expert), holders in placement.replicas.items():
        for m, host in enumerate(holders):
            got = 0
            if host in parts:
                got = dict(zip(parts[host].experts, parts[host].counts, strict=True)).get(expert, 0)
            assert got == counts_EM[expert, m]


def test_a_slow_replica_gets_fewer_rows() -> None:
    hosts = tuple(
        HostInfo(id=HostId(name), address=name, time_model=TimeModel(0.001, row_s))
        for name, row_s in (("fast", 1e-5), ("slow", 3e-5))
    )
    replicas = {ExpertId(0, 0): (HostId("fast"), HostId("slow"))}
    placement = Placement(epoch=1, hosts=hosts, num_experts=(1,), replicas=replicas)
    parts = make_dispatch_plan(placement, 0, np.zeros(4096, dtype=np.int64), 1, np.arange(4096))
    counts = {part.host.id: part.counts[0] for part in parts}
    assert counts == {"fast": pytest.approx(3072, abs=16), "slow": pytest.approx(1024, abs=16)}


@given(cases())
def test_equal_inputs_give_equal_plans(case) -> None:
    placement, expert_P, num_choices, pairs = case
    again = Placement.from_json(placement.to_json())
    first = make_dispatch_plan(placement, 0, expert_P, num_choices, pairs)
    second = make_dispatch_plan(placement, 0, expert_P, num_choices, pairs)
    assert [part.pairs.tolist() for part in first] == [part.pairs.tolist() for part in second]
    assert {e: set(h) for e, h in again.replicas.items()} == {e: set(h) for e, h in placement.replicas.items()}


def test_an_expert_without_a_replica_is_named() -> None:
    host = HostInfo(id=HostId("a"), address="a:1")
    placement = Placement(epoch=1, hosts=(host,), num_experts=(0, 3), replicas={ExpertId(1, 0): (host.id,)})
    with pytest.raises(NoReadyReplicaError) as caught:
        make_dispatch_plan(placement, 1, np.array([0, 2]), 1, np.array([0, 1]))
    assert caught.value.expert == ExpertId(1, 2)


def test_a_table_leaves_out_hosts_that_failed_and_avoided_ones_where_others_hold_the_expert() -> None:
    hosts = tuple(HostInfo(id=HostId(name), address=name) for name in "ab")
    replicas = {ExpertId(0, 0): (hosts[0].id, hosts[1].id), ExpertId(0, 1): (hosts[0].id,)}
    placement = Placement(epoch=7, hosts=hosts, num_experts=(2,), replicas=replicas)
    a, b = (host.id for host in hosts)
    assert placement.table(0, failed=frozenset({a})).num_replicas_E.tolist() == [1, 0]
    assert placement.table(0, failed=frozenset({a})).host_EM.tolist() == [[1], [0]]
    assert placement.table(0, avoided=frozenset({a})).num_replicas_E.tolist() == [1, 1]
    assert placement.table(0, avoided=frozenset({a})).host_EM.tolist() == [[1], [0]]
    assert placement.table(0, avoided=frozenset({a, b})).num_replicas_E.tolist() == [2, 1]
    assert placement.table(0, frozenset({a}), frozenset({b})).host_EM.tolist() == [[1], [0]]
