"""Relieve the slowest hosts of a layer, one replica at a time.

The hosts that are too slow, with all hosts that their rows could flow to, are a closed set: nothing helps but a
replica outside of it. Each step puts one expert of the set on a host outside: into a free slot, else in the place of
a replica that is not needed, else in exchange for a colder expert. What counts is how many rows cannot be done in
time; it is computed exactly, and a step that does not lower it is not taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product
from typing import TYPE_CHECKING

from expertmesh.control.planner.copies import earns_another, heat_unit

if TYPE_CHECKING:
    from expertmesh.control.planner.draft import Draft, LayerTimes, Layout

_TRIED = 3
"""Experts of a closed set that each kind of step is tried with, and hosts outside of it."""
_WORTHWHILE = 0.05
"""Part of the rows above the goal that a step should relieve; if none does, the next kind of step is tried too."""
_ROUNDING = 1e-6
"""A step that relieves less than this part does not help."""
_MOST_TRIES = 96
"""Keeps planning quick in large fleets; the next plan goes on."""

Step = Sequence[tuple[int, Sequence[int]]]
"""Experts with their new hosts."""


def relieve(draft: Draft, layer: int, goal: float) -> Layout:
    """A layout whose slowest host takes `goal` or as little above it as steps lead to. `draft` stays as it is."""
    trial = _Trial(draft, layer, goal)
    while trial.stuck and trial.num_tries < _MOST_TRIES and trial.step():
        pass
    return trial.layout


class _Trial:
    """One layer while steps are tried on it."""

    def __init__(self, draft: Draft, layer: int, goal: float) -> None:
        self._draft = draft
        self._fleet = draft.fleet
        self._loads = draft.loads[layer]
        self._goal = goal
        self._unit = heat_unit(self._loads, draft.fleet.num_working)
        self._free = list(draft.free)
        self.num_tries = 0
        self.layout = [list(hosts) for hosts in draft.layers[layer]]
        self._times = draft.times(layer).moved(())
        self._push()

    def _push(self) -> None:
        self.stuck = set(self._times.levels.relieve(self._goal))
        """Hosts above the goal, with all that their rows could flow to."""
        self._above = self._rows_above(self._times, self.stuck)

    def _rows_above(self, times: LayerTimes, stuck: Iterable[int]) -> float:
        return sum(max(0.0, times.work[host] - self._goal * self._fleet.rate[host]) for host in stuck)

    def step(self) -> bool:
        """Take the best step of the first kind that is worthwhile; whether there was any that helps."""
        best: tuple[float, Step, LayerTimes] | None = None
        for kind in (self._additions, self._replacements, self._exchanges):
            for step in kind():
                if not all(self._fleet.spans(hosts) or not self._fleet.spans(self.layout[e]) for e, hosts in step):
                    continue
                self.num_tries += 1
                times = self._times.moved(step)
                above = self._rows_above(times, times.levels.relieve(self._goal))
                if best is None or above < best[0]:
                    best = above, step, times
            if best is not None and best[0] < self._above * (1 - _WORTHWHILE):
                break
        if best is None or best[0] >= self._above * (1 - _ROUNDING):
            return False
        _, step, self._times = best
        for expert, hosts in step:
            for host in self.layout[expert]:
                self._free[host] += 1
            for host in hosts:
                self._free[host] -= 1
            self.layout[expert] = sorted(hosts)
        self._push()
        return True

    def _confined(self) -> list[int]:
        """Experts that only hosts of the closed set hold, hottest first."""
        inside = [e for e, hosts in enumerate(self.layout) if hosts and self.stuck.issuperset(hosts) and self._loads[e]]
        return sorted(inside, key=lambda e: (-self._loads[e], e))

    def _slack(self, host: int) -> float:
        """Rows that a host could take on; negative for one above the goal."""
        return self._goal * self._fleet.rate[host] - self._times.work[host]

    def _outside(self) -> list[int]:
        """Hosts outside of the closed set, most slack first."""
        hosts = (h for h, rate in enumerate(self._fleet.rate) if rate > 0 and h not in self.stuck)
        return sorted(hosts, key=lambda h: (-self._slack(h), h))

    def _additions(self) -> Iterator[Step]:
        """Into free slots: another replica of a hot expert, the only one of another."""
        room = [host for host in self._outside() if self._free[host] > 0]
        if not room:
            return
        host = room[0]
        confined = self._confined()
        for expert in confined[:_TRIED]:
            yield ((expert, (*self.layout[expert], host)),)
        # Whole experts, where the slack is enough for them: no slot more is used.
        movable = [e for e in confined if len(self.layout[e]) == 1 and self._loads[e] <= self._slack(host)]
        for expert in movable[:_TRIED]:
            if not earns_another(self._loads[expert], 1, self._unit):
                yield ((expert, (host,)),)

    def _replacements(self) -> Iterator[Step]:
        """In the place of replicas that others of the same expert can make up for, coldest first."""
        given_up = ((host, self._coldest_spare(host)) for host in self._outside())
        confined = self._confined()[:_TRIED]
        for host, cold in islice(((host, cold) for host, cold in given_up if cold is not None), _TRIED):
            rest = [other for other in self.layout[cold] if other != host]
            for expert in confined:
                yield (cold, rest), (expert, (*self.layout[expert], host))

    def _coldest_spare(self, host: int) -> int | None:
        """Of the experts that can lose their replica on this host, the one whose others would get least to do."""
        spare = [e for e, hosts in enumerate(self.layout) if host in hosts and self._draft.can_lose(hosts, host)]
        return min(spare, key=lambda e: (self._loads[e] / (len(self.layout[e]) - 1), e), default=None)

    def _exchanges(self) -> Iterator[Step]:
        """An expert of the hosts furthest above the goal for a colder one of a host outside."""
        furthest = sorted(self.stuck, key=lambda host: (self._slack(host), host))[:_TRIED]
        for busy, other in product(furthest, self._outside()[:_TRIED]):
            theirs = [e for e, hosts in enumerate(self.layout) if other in hosts and busy not in hosts]
            if not theirs:
                continue
            cold = min(theirs, key=lambda e: (self._part(e), e))
            fitting = [
                e
                for e, hosts in enumerate(self.layout)
                if busy in hosts and other not in hosts and 0 < self._part(e) - self._part(cold) <= self._slack(other)
            ]
            if fitting:
                hot = max(fitting, key=lambda e: (self._part(e), -e))
                yield (
                    (hot, [other if host == busy else host for host in self.layout[hot]]),
                    (cold, [busy if host == other else host for host in self.layout[cold]]),
                )

    def _part(self, expert: int) -> float:
        """Of an expert's load, an even part for each replica: a cheap guide."""
        return self._loads[expert] / len(self.layout[expert])
