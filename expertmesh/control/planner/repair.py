"""Make a draft whole: every expert on as many hosts as it must be, spanning what it must span, no host overfull.

What is missing is put where it costs least. Where no slot is free for it, replicas move over (augmenting paths of the
matching of experts and slots), so that whatever fits is found to fit.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING

from expertmesh.errors import ConfigError
from expertmesh.ids import ExpertId

if TYPE_CHECKING:
    from collections.abc import Iterable

    from expertmesh.control.planner.draft import Draft


def shed(draft: Draft) -> None:
    """Take from hosts that hold more than they may: first what has more replicas than it must, then the coldest."""
    for host, free in enumerate(draft.free):
        if free >= 0:
            continue
        held = sorted(
            (
                len(hosts) <= draft.min_replicas,
                draft.loads[layer][expert] / len(hosts),
                layer,
                expert,
            )
            for layer, layout in enumerate(draft.layers)
            for expert, hosts in enumerate(layout)
            if host in hosts
        )
        for _, _, layer, expert in held[:-free]:
            draft.drop(layer, expert, host)


def complete(draft: Draft) -> None:
    """Give every expert the replicas that it must have. Raises ConfigError when there is no way to."""
    for layer, layout in enumerate(draft.layers):
        lacking = [e for e, hosts in enumerate(layout) if len(hosts) < draft.min_replicas]
        if lacking:
            work = _even_work(draft, layer)
            lacking.sort(key=lambda e: (-draft.loads[layer][e], e))
            for expert in lacking:
                while len(layout[expert]) < draft.min_replicas:
                    _add_one(draft, layer, expert, work)


def spread_out(draft: Draft) -> None:
    """Move replicas of experts that one failure could take out though the fleet has room to prevent it."""
    for layer, layout in enumerate(draft.layers):
        for expert, hosts in enumerate(layout):
            if draft.fleet.spans(hosts):
                continue
            assert draft.fleet.span is not None
            of = draft.fleet.domains[draft.fleet.span]
            here = of[hosts[0]]
            # Its own slot comes free first: another replica may need it to make room elsewhere.
            work = _even_work(draft, layer)
            leaving = max(hosts, key=lambda host: (work[host] / (draft.fleet.rate[host] or 1e-300), host))
            draft.drop(layer, expert, leaving)
            elsewhere = [host for host, domain in enumerate(of) if domain != here]
            if not _make_room(draft, layer, expert, elsewhere):
                draft.add(layer, expert, leaving)


def _even_work(draft: Draft, layer: int) -> list[float]:
    """Each host's rows per second if replicas shared evenly: a cheap guide."""
    work = [0.0] * len(draft.free)
    for load, hosts in zip(draft.loads[layer], draft.layers[layer], strict=True):
        for host in hosts:
            work[host] += load / len(hosts)
    return work


def _add_one(draft: Draft, layer: int, expert: int, work: list[float]) -> None:
    fleet, hosts = draft.fleet, draft.layers[layer][expert]
    load = draft.loads[layer][expert] / (len(hosts) + 1)

    def regret(host: int) -> tuple[object, ...]:
        rate = fleet.rate[host]
        finish = (work[host] + load) / rate if rate else inf
        return (*fleet.shared_domains(host, hosts), finish, fleet.cost[host], -draft.free[host], host)

    free = [host for host, n in enumerate(draft.free) if n > 0 and host not in hosts]
    if free:
        host = min(free, key=regret)
        draft.add(layer, expert, host)
        work[host] += load
        return
    if not _make_room(draft, layer, expert, range(len(draft.free))):
        raise ConfigError(
            f"expert {ExpertId(layer, expert)} finds no {draft.min_replicas} hosts with a free slot: give the smaller "
            "hosts more slots, or lower min_replicas"
        )


def _make_room(draft: Draft, layer: int, expert: int, on: Iterable[int]) -> bool:
    """Add a replica on one of the hosts `on`, moving others over if need be; whether that was possible.

    Breadth first over hosts: one with a free slot, or with a replica that is not needed, ends the search.
    """
    hosts = draft.layers[layer][expert]
    start = sorted((host for host in on if host not in hosts), key=lambda host: (-draft.free[host], host))
    held = _held(draft)
    came_by: dict[int, tuple[tuple[int, int], int | None]] = dict.fromkeys(start, ((layer, expert), None))
    queue = deque(start)
    while queue:
        host = queue.popleft()
        if draft.fleet.slots[host] == 0:
            continue
        if draft.free[host] <= 0:
            unneeded = next((r for r in held[host] if draft.can_lose(draft.layers[r[0]][r[1]], host)), None)
            if unneeded is None:
                for replica, other in _moves(draft, held[host], host):
                    if other not in came_by:
                        came_by[other] = (replica, host)
                        queue.append(other)
                continue
            draft.drop(*unneeded, host)
        at: int | None = host
        while at is not None:
            (of_layer, of_expert), before = came_by[at]
            if before is not None:
                draft.drop(of_layer, of_expert, before)
            draft.add(of_layer, of_expert, at)
            at = before
        return True
    return False


def _held(draft: Draft) -> list[list[tuple[int, int]]]:
    held: list[list[tuple[int, int]]] = [[] for _ in draft.free]
    for layer, layout in enumerate(draft.layers):
        for expert, hosts in enumerate(layout):
            for host in hosts:
                held[host].append((layer, expert))
    return held


def _moves(draft: Draft, replicas: Iterable[tuple[int, int]], host: int) -> Iterable[tuple[tuple[int, int], int]]:
    """Which of the replicas on `host` could be on which other host instead."""
    for layer, expert in replicas:
        hosts = draft.layers[layer][expert]
        rest = [other for other in hosts if other != host]
        for other in range(len(draft.free)):
            if other not in hosts and (draft.fleet.spans((*rest, other)) or not draft.fleet.spans(hosts)):
                yield (layer, expert), other
