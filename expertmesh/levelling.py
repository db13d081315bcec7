"""Spread rows over hosts so that the slowest host is as fast as it can be. Pure arithmetic, shared by both planes.

The planner asks what a placement is worth, exactly; a router asks where the rows of one batch go, quickly. It is the
same problem: every expert brings rows that may go to any of its hosts, in any parts, and the host that needs longest
counts. Nothing here knows of layers, slots or what a row is.

The method: pour expert after expert like water into connected vessels, which levels nearly everything; then push what
is still above the target along paths of experts that share hosts (augmenting paths). Hosts that cannot get below the
target set a higher one, what they carry over how fast they are together: Newton's method on the minimum cut, so the
result is the optimum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_DUST = 1e-12
"""Part of all rows that is too little to be pushed."""

_Hop = tuple[int, int]
"""How rows get to a host: the expert that can move some there, and the host that it would move them from."""


def pour(rows: float, hosts: Sequence[int], load: list[float], rate: Sequence[float]) -> dict[int, float]:
    """Add `rows` to the `load` of `hosts` so that their slowest time is least; how many each of them got."""
    if len(hosts) == 2:  # the most common case by far, and in a router's hot path
        a, b = hosts
        to_a = (rows + load[a] + load[b]) / (rate[a] + rate[b]) * rate[a] - load[a]
        to_a = 0.0 if to_a < 0 else min(to_a, rows)
        load[a] += to_a
        load[b] += rows - to_a
        return {a: to_a, b: rows - to_a}
    by_time = sorted([(load[host] / rate[host], host) for host in hosts])
    speed = 0.0
    reached = 0
    for time, host in by_time:
        if speed and time * speed >= rows:
            break
        rows += load[host]
        speed += rate[host]
        reached += 1
    height = rows / speed
    given = dict.fromkeys(hosts, 0.0)
    for _, host in by_time[:reached]:
        full = height * rate[host]
        given[host] = full - load[host]
        load[host] = full
    return given


class Levels:
    """Rows of several experts over hosts. Invariant: each expert's rows are on its hosts, all of them."""

    def __init__(
        self, rows: Sequence[float], hosts: Sequence[Sequence[int]], load: list[float], rate: Sequence[float]
    ) -> None:
        """Pour `rows[i]` over `hosts[i]`, for all i, on top of `load`, which is updated. Rates are positive.

        Those with least choice go first: what can go anywhere fills the gaps that they leave, in a second round again.
        """
        self.load = load
        self.given: list[dict[int, float]] = [{}] * len(rows)
        """given[i][host]: how many of expert i's rows the host gets."""
        self._rate = rate
        self._held: list[list[int]] = [[] for _ in load]
        order = sorted(range(len(rows)), key=lambda i: (len(hosts[i]), -rows[i]))
        for i in order:
            self.given[i] = pour(rows[i], hosts[i], load, rate)
            for host in hosts[i]:
                self._held[host].append(i)
        for i in order:
            for host, part in self.given[i].items():
                load[host] -= part
            self.given[i] = pour(rows[i], hosts[i], load, rate)
        self._dust = _DUST * sum(load)

    def copy(self) -> Levels:
        twin = Levels.__new__(Levels)
        twin.load, twin._rate, twin._dust = list(self.load), self._rate, self._dust
        twin.given = [dict(given) for given in self.given]
        twin._held = [list(held) for held in self._held]
        return twin

    def append(self, rows: float, hosts: Sequence[int]) -> None:
        """One expert more."""
        for host in hosts:
            self._held[host].append(len(self.given))
        self.given.append(pour(rows, hosts, self.load, self._rate))

    def move(self, i: int, hosts: Sequence[int]) -> None:
        """Give expert i other hosts."""
        rows = 0.0
        for host, part in self.given[i].items():
            rows += part
            self.load[host] -= part
            self._held[host].remove(i)
        for host in hosts:
            self._held[host].append(i)
        self.given[i] = pour(rows, hosts, self.load, self._rate)

    def settle(self, tolerance: float = 1e-9) -> None:
        """Make the slowest host's time least, within a relative tolerance."""
        load, rate = self.load, self._rate
        target = sum(load) / sum(rate)
        while above := self._above(target * (1 + tolerance)):
            low, came_by, is_all = self._reach(above, target)
            if is_all:
                # What these hosts carry cannot leave them: even level among themselves they take this long.
                least = sum([load[host] for host in came_by]) / sum([rate[host] for host in came_by])
                if least > target * (1 + _DUST):
                    target = least
                    continue
            if not low:  # rounding alone is left
                return
            self._push(low, came_by, target)

    def relieve(self, target: float) -> Collection[int]:
        """Push rows from hosts whose time is above `target` to others, as far as that goes.

        Returns hosts that stay above it, with all hosts that rows of theirs could get to; empty when all are relieved.
        """
        while above := self._above(target):
            low, came_by, _ = self._reach(above, target)
            if not low:
                return came_by.keys()
            self._push(low, came_by, target)
        return ()

    def _above(self, time: float) -> list[int]:
        dust = self._dust
        return [
            i for i, (rows, rate) in enumerate(zip(self.load, self._rate, strict=True)) if rows > time * rate + dust
        ]

    def _reach(self, above: list[int], target: float) -> tuple[list[int], dict[int, _Hop | None], bool]:
        """Which hosts rows of `above` can get to: those of them below `target`, how one gets to each, and if it is all.

        The search ends early when what it found has room for all rows above the target.
        """
        load, rate, dust = self.load, self._rate, self._dust
        excess = sum([load[host] - target * rate[host] for host in above])
        queue = list(above)
        low: list[int] = []
        came_by: dict[int, _Hop | None] = dict.fromkeys(above)
        seen = set()
        for host in queue:
            for i in self._held[host]:
                given = self.given[i]
                if i in seen or given[host] <= dust:
                    continue
                seen.add(i)
                for other in given:
                    if other not in came_by:
                        came_by[other] = (i, host)
                        queue.append(other)
                        slack = target * rate[other] - load[other]
                        if slack > dust:
                            low.append(other)
                            excess -= slack
            if excess < 0:
                return low, came_by, False
        return low, came_by, True

    def _push(self, low: list[int], came_by: dict[int, _Hop | None], target: float) -> None:
        """Move to each host of `low` as many rows as its path from hosts above the target still allows.

        The path starts at an expert: any host above the target that it has rows on will do.
        """
        load, rate = self.load, self._rate
        sources: dict[int, list[int]] = {}
        for last in low:
            path = []
            host, hop = last, came_by[last]
            while hop:
                i, before = hop
                path.append((self.given[i], before, host))
                host, hop = before, came_by[before]
            given, _, first = path.pop()
            if i not in sources:
                sources[i] = [host for host in given if came_by.get(host, 0) is None]
            room = min([target * rate[last] - load[last], *(parts[before] for parts, before, _ in path)])
            while room > self._dust and sources[i]:
                source = sources[i][-1]
                rows = min(room, given[source], load[source] - target * rate[source])
                if rows > 0:
                    given[source] -= rows
                    given[first] += rows
                    for parts, before, after in path:
                        parts[before] -= rows
                        parts[after] += rows
                    load[source] -= rows
                    load[last] += rows
                    room -= rows
                if room > 0:
                    sources[i].pop()
