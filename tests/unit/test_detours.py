"""Around hosts that cannot have an expert."""

from __future__ import annotations

import random
from collections import Counter

from expertmesh.control.detours import around
from expertmesh.ids import ExpertId, HostId

A, B, C = (HostId(name) for name in "abc")
E0, E1, E2 = (ExpertId(0, index) for index in range(3))


def test_nothing_changes_where_nothing_is_banned() -> None:
    replicas = {E0: (A, B), E1: (C,)}
    assert around(replicas, {(E1, A)}, {A: 2, B: 2, C: 2}) == replicas


def test_a_replica_goes_where_there_is_most_room() -> None:
    assert around({E0: (A,), E1: (B,)}, {(E0, A)}, {A: 2, B: 2, C: 2}) == {E0: (C,), E1: (B,)}


def test_it_goes_to_no_host_that_has_one_or_is_banned_too() -> None:
    slots = {A: 3, B: 3, C: 3}
    assert around({E0: (A, B)}, {(E0, A)}, slots) == {E0: (B, C)}
    assert around({E0: (A, B)}, {(E0, A), (E0, C)}, slots) == {E0: (A, B)}


def test_where_all_are_full_two_experts_change_places() -> None:
    assert around({E0: (A,), E1: (B,)}, {(E0, A)}, {A: 1, B: 1}) == {E0: (B,), E1: (A,)}
    assert around({E0: (A,), E1: (B,)}, {(E0, A), (E1, A)}, {A: 1, B: 1}) == {E0: (A,), E1: (B,)}


def test_what_comes_out_fits_and_has_as_many_replicas_whatever_is_banned() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        slots = {host: rng.randint(1, 4) for host in (A, B, C)}
        replicas: dict[ExpertId, tuple[HostId, ...]] = {}
        room = dict(slots)
        for expert in (E0, E1, E2):
            free = [host for host in room if room[host] > 0]
            chosen = sorted(rng.sample(free, rng.randint(0, len(free))))
            for host in chosen:
                room[host] -= 1
            replicas[expert] = tuple(chosen)
        pairs = [(expert, host) for expert in replicas for host in slots]
        banned = set(rng.sample(pairs, rng.randint(0, 4)))
        result = around(replicas, banned, slots)
        used = Counter(host for hosts in result.values() for host in hosts)
        assert all(used[host] <= slots[host] for host in slots)
        assert {e: len(hosts) for e, hosts in result.items()} == {e: len(hosts) for e, hosts in replicas.items()}
        assert all(len(set(hosts)) == len(hosts) for hosts in result.values())
        still = {(e, h) for e, hosts in result.items() for h in hosts} & banned
        assert still <= {(e, h) for e, hosts in replicas.items() for h in hosts}, "none is put where it is banned"
