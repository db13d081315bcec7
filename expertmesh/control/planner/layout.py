"""Lay out one layer from nothing: which hosts hold each expert, given how many replicas it deserves.

Heavy experts go first, each replica where it would be done first (longest processing time on unlike machines), with
one twist that matters when the load drifts: replicas *link* hosts. Rows of a replicated expert can flow between its
hosts, so hosts that are linked, also through others, can help each other out; a group without a link to the rest
cannot. So an expert's first replica joins a host that already has work, and each further one prefers hosts not yet
linked with those it has. The many light experts then fill up what is left, cheapest host first.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

from expertmesh.control.planner.draft import LayerTimes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from expertmesh.control.planner.draft import Layout
    from expertmesh.control.planner.fleet import Fleet
    from expertmesh.control.planner.values import PlanOptions

_HEAVY = 0.25
"""Part of an average host's work from which an expert counts as heavy."""
_JOIN = 0.9
"""How full a host may get by the first replica of an expert that joins it."""
_FLOOR = 0.02
"""Experts count for at least this part of the average one, so that those without load are spread too."""


def lay_out(
    fleet: Fleet,
    loads: Sequence[float],
    counts: Sequence[int],
    quota: Sequence[int],
    current: Layout,
    options: PlanOptions,
) -> Layout:
    """The hosts of every expert of one layer: `counts[e]` of them, or fewer where `quota`, slots per host, runs out.

    Those have to be repaired. Among hosts that keep the layer in time, those that hold the expert in `current` are
    preferred.
    """
    floor = _FLOOR * sum(loads) / len(loads) or 1.0
    load = [max(floor, x) for x in loads]
    # A host without rate is left to those who complete the layout: it is never a good choice.
    room = [n if rate > 0 else 0 for n, rate in zip(quota, fleet.rate, strict=True)]
    in_time = fleet.ideal(load)
    share = [x / n for x, n in zip(load, counts, strict=True)]
    least_heavy = _HEAVY * sum(load) / fleet.num_working
    heavy = [e for e, n in enumerate(counts) if n > options.min_replicas or share[e] > least_heavy]
    light = sorted(set(range(len(load))).difference(heavy), key=lambda e: (-share[e], e))

    hosts: Layout = [[]] * len(load)
    linked = _Linked(fleet, room, in_time)
    for e in sorted(heavy, key=lambda e: (-share[e], e)):
        hosts[e] = _spread_or_short(fleet, linked.place(share[e], counts[e], options.min_replicas, current[e]))

    def fill(work: list[float], in_time: float) -> Layout:
        filling = _Filling(fleet, linked.room.tolist(), work, in_time)
        filled = list(hosts)
        for e in light:
            filled[e] = _spread_or_short(fleet, filling.place(share[e], counts[e], current[e]))
        return filled

    plain = fill(linked.work.tolist(), in_time)
    if len(set(fleet.cost)) == 1:
        return plain
    # Rows of replicated experts can make way for cold experts on cheap hosts. Whether they can enough, the exact times
    # tell.
    work = [0.0] * len(room)
    for e in heavy:
        if len(hosts[e]) == 1:
            work[hosts[e][0]] += share[e]
    slowest = max((x / rate for x, rate in zip(work, fleet.rate, strict=True) if rate), default=0.0)
    frugal = fill(work, max(in_time, slowest))
    limit = max(LayerTimes(fleet, loads, plain).settle(), fleet.ideal(loads) * (1 + options.min_gain))
    return frugal if LayerTimes(fleet, loads, frugal).settle() <= limit else plain


def _spread_or_short(fleet: Fleet, hosts: list[int]) -> list[int]:
    """In order; where the quota left no room to span failure domains, one of them only. Repair sees all slots."""
    if len(hosts) == 1:
        return hosts
    return sorted(hosts) if fleet.spans(hosts) else hosts[:1]


class _Linked:
    """Places heavy experts one by one, keeping account of which hosts are linked. Arrays are per host."""

    def __init__(self, fleet: Fleet, room: list[int], in_time: float) -> None:
        self.room = np.array(room)
        self.work = np.zeros(len(room))
        """Rows per second given so far."""
        self._rate = np.array([rate or 1.0 for rate in fleet.rate])
        # Where every host is a domain of its own, keeping replicas apart is keeping them on distinct hosts.
        self._domains = [np.array(of) for of in fleet.domains if len(set(of)) < len(of)]
        self._group = np.arange(len(room))
        """Hosts with the same number are linked."""
        self._in_time = in_time

    def place(self, share: float, count: int, min_replicas: int, current: Sequence[int]) -> list[int]:
        finish = (self.work + share) / self._rate
        finish[self.room <= 0] = np.inf
        held = None
        if current:
            held = np.zeros(len(finish), dtype=np.bool_)
            held[current] = True
        linked = np.zeros(len(finish), dtype=np.bool_)
        mine: list[int] = []
        for i in range(count):
            if i == 0:
                host = self._join(finish, held) if count > 1 else int(_narrow(finish, held, self._in_time).argmin())
            else:
                host = self._extend(finish, mine, linked, held, must_be_apart=i < min_replicas)
            if finish[host] == np.inf:
                break
            mine.append(host)
            self.room[host] -= 1
            self.work[host] += share
            finish[host] = np.inf
            linked |= self._group == self._group[host]
        if len(mine) > 1:
            self._group[linked] = self._group[mine[0]]
        return mine

    def _join(self, finish: NDArray[np.float64], held: NDArray[np.bool_] | None) -> int:
        """For the first of several replicas: the fullest host with room for it, to link it with those to come."""
        fitting = (finish <= _JOIN * self._in_time) & (self.work > 0)
        if held is not None and (fitting & held).any():
            fitting &= held
        if fitting.any():
            return int(np.where(fitting, finish, -np.inf).argmax())
        return int(_narrow(finish, held, self._in_time).argmin())

    def _extend(
        self,
        finish: NDArray[np.float64],
        mine: list[int],
        linked: NDArray[np.bool_],
        held: NDArray[np.bool_] | None,
        *,
        must_be_apart: bool,
    ) -> int:
        """For a further replica: a host in another domain, not yet linked with the others, soonest done."""
        for of in self._domains:
            apart = np.ones(len(of), dtype=np.bool_)
            for host in mine:
                apart &= of != of[host]
            finish = _narrow(finish, apart, np.inf if must_be_apart else self._in_time)
        finish = _narrow(finish, ~linked, self._in_time)
        return int(_narrow(finish, held, self._in_time).argmin())


def _narrow(finish: NDArray[np.float64], to: NDArray[np.bool_] | None, limit: float) -> NDArray[np.float64]:
    """Only the hosts `to`, if one of them is done within `limit`; otherwise all, as before."""
    if to is None:
        return finish
    narrowed = np.where(to, finish, np.inf)
    best = narrowed[narrowed.argmin()]
    return narrowed if best <= limit and best < np.inf else finish


class _Filling:
    """Places light experts one by one: on the cheapest host that stays in time, there on the one with least work."""

    def __init__(self, fleet: Fleet, room: list[int], work: list[float], in_time: float) -> None:
        self._fleet = fleet
        self._room = room
        self._work = work
        self._in_time = in_time
        by_cost: dict[float, list[tuple[float, int]]] = {}
        for host, n in enumerate(room):
            if n > 0:
                by_cost.setdefault(fleet.cost[host], []).append((work[host] / fleet.rate[host], host))
        self._heaps = [by_cost[cost] for cost in sorted(by_cost)]
        """Per cost, hosts by the time that their work takes. An entry's time may be too small, for work grows."""
        for heap in self._heaps:
            heapq.heapify(heap)

    def place(self, share: float, count: int, current: Sequence[int]) -> list[int]:
        mine: list[int] = []
        for host in current:
            if len(mine) < count and self._room[host] > 0 and self._finish(host, share) <= self._in_time:
                self._take(host, share, mine)
        while len(mine) < count and (chosen := self._choose(share, mine)) is not None:
            self._take(chosen, share, mine)
        return mine

    def _take(self, host: int, share: float, mine: list[int]) -> None:
        mine.append(host)
        self._room[host] -= 1
        self._work[host] += share

    def _finish(self, host: int, share: float) -> float:
        return (self._work[host] + share) / self._fleet.rate[host]

    def _choose(self, share: float, mine: list[int]) -> int | None:
        # Widest domain first: not in a used rack, else not on a used node, else any other host.
        for of in (*self._fleet.domains, None) if mine else (None,):
            used = {of[host] for host in mine} if of else set()
            found = []
            for heap in self._heaps:
                host = self._least_work(heap, mine, of, used)
                if host is None:
                    continue
                if self._finish(host, share) <= self._in_time:
                    return host
                found.append(host)
            if found:
                return min(found, key=lambda host: self._finish(host, share))
        return None

    def _least_work(
        self, heap: list[tuple[float, int]], mine: list[int], of: Sequence[int] | None, used: set[int]
    ) -> int | None:
        aside = []
        found = None
        while heap:
            time, host = heap[0]
            if self._room[host] <= 0:
                heapq.heappop(heap)
            elif time < (now := self._work[host] / self._fleet.rate[host]):
                heapq.heapreplace(heap, (now, host))
            elif host in mine or (of and of[host] in used):
                aside.append(heapq.heappop(heap))
            else:
                found = host
                break
        for entry in aside:
            heapq.heappush(heap, entry)
        return found
