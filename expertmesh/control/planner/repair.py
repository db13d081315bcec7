"""Make a draft whole: every expert on as many hosts as it must be, spanning what it must span, no host overfull.

What is missing is put where it costs least. Where no slot is free for it, replicas move over (augmenting paths of the
matching of experts and slots), so that whatever fits is found to fit.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from expertmesh.errors import ConfigError
from expertmesh.ids import ExpertId

if TYPE_CHECKING:
    from collections.abc import Iterable

    from expertmesh.control.planner.draft import Draft

_Replica = tuple[int, int]
"""Layer and expert, on a host that is known from elsewhere."""


def repair(draft: Draft) -> None:
    """Change a draft as little as makes it whole. Raises ConfigError when there is no way to."""
    _shed(draft)
    repairs = _Repairs(draft)
    for layer, layout in enumerate(draft.layers):
        lacking = [e for e, hosts in enumerate(layout) if len(hosts) < draft.min_replicas]
        for expert in sorted(lacking, key=lambda e: (-draft.loads[layer][e], e)):
            while len(layout[expert]) < draft.min_replicas:
                repairs.add_one(layer, expert)
    for layer, layout in enumerate(draft.layers):
        for expert, hosts in enumerate(layout):
            if not draft.fleet.spans(hosts):
                repairs.spread_out(layer, expert)


def _shed(draft: Draft) -> None:
    """Take from hosts that hold more than they may: first what has more replicas than it must, then the coldest."""
    for host, free in enumerate(draft.free):
        if free >= 0:
            continue
        held = sorted(
            (len(hosts) <= draft.min_replicas, draft.loads[layer][expert] / len(hosts), layer, expert)
            for layer, layout in enumerate(draft.layers)
            for expert, hosts in enumerate(layout)
            if host in hosts
        )
        for _, _, layer, expert in held[:-free]:
            draft.drop(layer, expert, host)


class _Repairs:
    """Keeps account of who holds what while replicas are added and moved."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._fleet = draft.fleet
        self._held: list[set[_Replica]] | None = None
        """Per host; made when first needed, which is seldom."""
        self._coldest: list[tuple[float, int, int]] | None = None
        """Experts that had more replicas than they must when first asked for: load of a replica, layer, expert."""
        self._work: dict[int, list[float]] = {}
        """Per layer, each host's rows per second if replicas shared evenly: a cheap guide, not kept up to date."""

    def add_one(self, layer: int, expert: int) -> None:
        """Give an expert a replica more, where it spans failure domains if it must."""
        hosts = self._draft.layers[layer][expert]
        free = [host for host, n in enumerate(self._draft.free) if n > 0 and host not in hosts]
        good = free
        if len(hosts) + 1 == self._draft.min_replicas:
            good = [host for host in free if self._fleet.spans((*hosts, host))]
            if not good and self._make_room(layer, expert, self._elsewhere(hosts)):
                return
        if good or free:
            self._add(layer, expert, min(good or free, key=lambda host: self._regret(layer, expert, host)))
        elif not self._make_room(layer, expert, range(len(self._draft.free))):
            raise ConfigError(
                f"expert {ExpertId(layer, expert)} finds no {self._draft.min_replicas} hosts with a free slot: give "
                "the smaller hosts more slots, or lower min_replicas"
            )

    def spread_out(self, layer: int, expert: int) -> None:
        """Move a replica of an expert whose hosts all fail together to another domain, if that can be."""
        hosts = self._draft.layers[layer][expert]
        # Its own slot comes free first: another replica may need it to make room elsewhere.
        leaving = max(hosts, key=lambda host: self._regret(layer, expert, host)[1:])
        self._drop(layer, expert, leaving)
        if not self._make_room(layer, expert, self._elsewhere(self._draft.layers[layer][expert])):
            self._add(layer, expert, leaving)

    def _elsewhere(self, hosts: list[int]) -> list[int]:
        """Hosts that an expert on `hosts` would span failure domains with."""
        return [host for host in range(len(self._draft.free)) if self._fleet.spans((*hosts, host))]

    def _regret(self, layer: int, expert: int, host: int) -> tuple[tuple[bool, ...], float, float, int, int]:
        """Less is better: in a domain of its own, soon done, cheap, empty."""
        draft, rate = self._draft, self._fleet.rate[host]
        if layer not in self._work:
            self._work[layer] = work = [0.0] * len(draft.free)
            for load, of in zip(draft.loads[layer], draft.layers[layer], strict=True):
                for other in of:
                    work[other] += load / len(of)
        hosts = draft.layers[layer][expert]
        finish = (self._work[layer][host] + draft.loads[layer][expert] / (len(hosts) + 1)) / rate if rate else inf
        return self._fleet.shared_domains(host, hosts), finish, self._fleet.cost[host], -draft.free[host], host

    def _add(self, layer: int, expert: int, host: int) -> None:
        self._draft.add(layer, expert, host)
        if self._held is not None:
            self._held[host].add((layer, expert))
        if layer in self._work:
            self._work[layer][host] += self._draft.loads[layer][expert] / len(self._draft.layers[layer][expert])

    def _drop(self, layer: int, expert: int, host: int) -> None:
        self._draft.drop(layer, expert, host)
        if self._held is not None:
            self._held[host].remove((layer, expert))

    def _make_room(self, layer: int, expert: int, on: Iterable[int]) -> bool:
        """Add a replica on one of the hosts `on`, moving others over if need be; whether that was possible.

        Breadth first over hosts: one with a free slot, or with a replica that is not needed, ends the search.
        """
        draft = self._draft
        hosts = draft.layers[layer][expert]
        frontier = [host for host in on if host not in hosts and self._fleet.slots[host] > 0]
        came_by: dict[int, tuple[_Replica, int | None]] = dict.fromkeys(frontier, ((layer, expert), None))
        while frontier:
            if (end := self._end(frontier)) is not None:
                at: int | None = end
                while at is not None:
                    replica, before = came_by[at]
                    if before is not None:
                        self._drop(*replica, before)
                    self._add(*replica, at)
                    at = before
                return True
            reached: list[int] = []
            for host in frontier:
                for replica, other in self._moves(host, came_by):
                    came_by[other] = (replica, host)
                    reached.append(other)
            frontier = reached
        return False

    def _end(self, frontier: list[int]) -> int | None:
        """The host with most free slots; if none has any, one with an unneeded replica, dropping the coldest."""
        draft = self._draft
        roomy = max(frontier, key=lambda host: (draft.free[host], -host))
        if draft.free[roomy] > 0:
            return roomy
        if self._coldest is None:
            self._coldest = sorted(
                (draft.loads[layer][expert] / len(hosts), layer, expert)
                for layer, layout in enumerate(draft.layers)
                for expert, hosts in enumerate(layout)
                if len(hosts) > draft.min_replicas
            )
        among = set(frontier)
        for _, layer, expert in self._coldest:
            hosts = draft.layers[layer][expert]
            for host in hosts:
                if host in among and draft.can_lose(hosts, host):
                    self._drop(layer, expert, host)
                    return host
        return None

    def _replicas_on(self, host: int) -> set[_Replica]:
        if self._held is None:
            self._held = [set() for _ in self._draft.free]
            for layer, layout in enumerate(self._draft.layers):
                for expert, hosts in enumerate(layout):
                    for holder in hosts:
                        self._held[holder].add((layer, expert))
        return self._held[host]

    def _moves(self, host: int, known: dict[int, tuple[_Replica, int | None]]) -> Iterable[tuple[_Replica, int]]:
        """A replica on `host` for each host not yet known that it could be on instead, no less safe than now."""
        others = [other for other, slots in enumerate(self._fleet.slots) if slots > 0 and other not in known]
        for replica in sorted(self._replicas_on(host)) if others else ():
            layer, expert = replica
            hosts = self._draft.layers[layer][expert]
            rest = [other for other in hosts if other != host]
            for other in list(others):
                if other not in hosts and (self._fleet.spans((*rest, other)) or not self._fleet.spans(hosts)):
                    others.remove(other)
                    yield replica, other
            if not others:
                return
