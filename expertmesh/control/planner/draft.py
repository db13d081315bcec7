"""A placement while it is worked on: who holds what, which slots are free, and how long each layer takes.

Invariant: no host holds more replicas than it has slots, and none of an expert twice; hosts are in ascending order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from expertmesh.levelling import Levels

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from expertmesh.control.planner.fleet import Fleet
    from expertmesh.control.planner.values import Loads

Layout = list[list[int]]
"""The hosts of each expert of one layer. The inner lists are never changed, so layouts may share them."""


@dataclass(slots=True)
class Draft:
    """All layers, over one budget of slots."""

    fleet: Fleet
    loads: Loads
    min_replicas: int
    layers: list[Layout]
    free: list[int] = field(init=False)
    """Usable slots of each host without a replica."""
    changes: int = 0
    """Counts them, so that it can be seen whether there were any."""
    _times: dict[int, LayerTimes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(self.fleet.slots)
        for layout in self.layers:
            for hosts in layout:
                for host in hosts:
                    self.free[host] -= 1

    def add(self, layer: int, expert: int, host: int) -> None:
        self.layers[layer][expert] = sorted((*self.layers[layer][expert], host))
        self.free[host] -= 1
        self._changed(layer)

    def drop(self, layer: int, expert: int, host: int) -> None:
        self.layers[layer][expert] = [other for other in self.layers[layer][expert] if other != host]
        self.free[host] += 1
        self._changed(layer)

    def replace(self, layer: int, layout: Layout) -> None:
        """Exchange a whole layer."""
        for sign, old in ((1, self.layers[layer]), (-1, layout)):
            for hosts in old:
                for host in hosts:
                    self.free[host] += sign
        self.layers[layer] = layout
        self._changed(layer)

    def _changed(self, layer: int) -> None:
        self.changes += 1
        self._times.pop(layer, None)

    def times(self, layer: int) -> LayerTimes:
        """What a layer takes with the best split of its experts' loads."""
        if layer not in self._times:
            self._times[layer] = times = LayerTimes(self.fleet, self.loads[layer], self.layers[layer])
            times.settle()
        return self._times[layer]

    def can_lose(self, hosts: Sequence[int], host: int) -> bool:
        """Whether an expert on `hosts` is as safe as it must be without this one."""
        return len(hosts) > self.min_replicas and self.fleet.spans(other for other in hosts if other != host)


class LayerTimes:
    """What one layer's experts take on their hosts, with the best split."""

    def __init__(self, fleet: Fleet, loads: Sequence[float], layout: Layout) -> None:
        self._fleet = fleet
        self._loads = loads
        self.is_stranded = False
        """Whether an expert with load is nowhere, or only where nothing is ever done."""
        self._fixed: dict[int, int] = {}
        """Experts that have no choice, with their host."""
        self._number: dict[int, int] = {}
        """Experts that have one, as `levels` numbers them."""
        work = [0.0] * len(fleet.ids)
        choices: list[Sequence[int]] = []
        for expert, hosts in enumerate(layout):
            useful = self._useful(hosts)
            if len(useful) == 1:
                self._fixed[expert] = host = useful[0]
                work[host] += loads[expert]
            elif useful:
                self._number[expert] = len(choices)
                choices.append(useful)
            elif loads[expert] > 0:
                self.is_stranded = True
        # A host of rate 0 has no work here; any positive rate keeps the arithmetic whole.
        rate = [x or 1e-300 for x in fleet.rate]
        self.levels = Levels([loads[expert] for expert in self._number], choices, work, rate)

    def _useful(self, hosts: Sequence[int]) -> Sequence[int]:
        return hosts if self._fleet.is_all_working else [host for host in hosts if self._fleet.rate[host]]

    @property
    def work(self) -> list[float]:
        """Rows per second of each host."""
        return self.levels.load

    def moved(self, changes: Iterable[tuple[int, Sequence[int]]]) -> LayerTimes:
        """The same with other hosts for some experts, starting from the split that was reached."""
        twin = LayerTimes.__new__(LayerTimes)
        twin._fleet, twin._loads, twin.is_stranded = self._fleet, self._loads, self.is_stranded
        twin._fixed, twin._number = dict(self._fixed), dict(self._number)
        twin.levels = self.levels.copy()
        for expert, hosts in changes:
            useful = self._useful(hosts)
            if expert in twin._number:
                twin.levels.move(twin._number[expert], useful)
            else:
                twin.work[twin._fixed.pop(expert)] -= self._loads[expert]
                twin._number[expert] = len(twin.levels.given)
                twin.levels.append(self._loads[expert], useful)
        return twin

    def settle(self) -> float:
        """The least time that the slowest host can have, over all fractional splits: exact."""
        self.levels.settle()
        return self.slowest()

    def slowest(self) -> float:
        """The slowest host's time with the split as it is now."""
        if self.is_stranded:
            return float("inf")
        return max((work / rate for work, rate in zip(self.work, self._fleet.rate, strict=True) if rate), default=0.0)

    def shares(self, expert: int, hosts: list[int]) -> dict[int, float]:
        """The part of an expert's load that each of its hosts takes."""
        if len(hosts) == 1:
            return {hosts[0]: 1.0}
        if expert in self._fixed:
            return {host: float(host == self._fixed[expert]) for host in hosts}
        given = self.levels.given[self._number[expert]] if expert in self._number else {}
        parts = {host: max(0.0, given.get(host, 0.0)) for host in hosts}
        total = sum(parts.values())
        if not total:
            return dict.fromkeys(hosts, 1 / len(hosts))
        return {host: part / total for host, part in parts.items()}


def num_moves(before: Layout, after: Layout) -> int:
    """Replicas of `after` that are not there before."""
    return sum(host not in old for old, new in zip(before, after, strict=True) for host in new)
