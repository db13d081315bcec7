"""What the hosts' counters say of the load of every expert. Pure.

Hosts report how much they have done since they started, never how much since they were last asked, so that a report
that is lost costs nothing and one that comes twice or late is seen for what it is. Knows neither who asks the hosts
nor what is decided from the answer. Its invariant: every row that a replica counted between two reports that name it
is counted here exactly once, at the moment it became known.
"""

from __future__ import annotations

import itertools
from math import exp, expm1, log
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from expertmesh.ids import ExpertId, HostId

T = TypeVar("T")

SHORTEST_S = 1e-6
"""Less than this between two ticks is nothing: it would drown in the rounding of what it is divided by."""


class _Report(NamedTuple):
    """The last that a host said."""

    at_s: float
    rows_of: dict[ExpertId, int]


class LoadMeter:
    """Smoothed load of every expert.

    Feed it with `observe`, whenever a report comes; `tick` then moves time forward. Only `tick` changes what `loads`
    says.
    """

    def __init__(self, num_experts: Sequence[int], *, half_life_s: float = 30.0) -> None:
        """Rows that are `half_life_s` old count half."""
        self._starts = (0, *itertools.accumulate(num_experts))
        self._half_life_s = half_life_s
        self._hosts: dict[HostId, _Report] = {}
        self._now_s: float | None = None
        # X counts the experts of all layers, one layer after the other.
        self._arrived_X = np.zeros(self._starts[-1])
        self._rows_X = np.zeros(self._starts[-1])
        self._total_X = np.zeros(self._starts[-1], dtype=np.int64)
        self._seconds = 0.0

    def observe(self, host: HostId, at_s: float, replicas: Iterable[tuple[ExpertId, int]]) -> None:
        """Take in what a host's replicas had computed at `at_s` of its own clock, in whatever order reports come.

        A host's first report is what its later ones are measured against; a replica that appears later counts from
        zero, and so does one whose count fell, for it was loaded anew.
        """
        known = self._hosts.get(host)
        if known is not None and at_s <= known.at_s:
            return
        rows_of = dict(replicas)
        self._hosts[host] = _Report(at_s, rows_of)
        if known is None:
            return
        for expert, rows in rows_of.items():
            before = known.rows_of.get(expert, 0)
            more = rows - before if rows >= before else rows
            self._arrived_X[self._starts[expert.layer] + expert.index] += more
            self._total_X[self._starts[expert.layer] + expert.index] += more

    def count(self, layer: int, rows_E: NDArray[np.integer]) -> None:
        """Take in rows of one layer that are known from elsewhere than a host's report."""
        self._arrived_X[self._starts[layer] : self._starts[layer + 1]] += rows_E

    def forget(self, host: HostId) -> None:
        """The host is gone for good; the load that it reported stays."""
        self._hosts.pop(host, None)

    def tick(self, now_s: float) -> None:
        """Smooth what has arrived since the last tick, as if it had come evenly. The first tick only starts the clock.

        Loads are rows over seconds, both fading with the same half-life: a load that does not change is shown exactly
        from the first moment on, and how often one ticks makes no difference to it.
        """
        if self._now_s is None:
            self._now_s = now_s
            self._arrived_X[:] = 0.0
            return
        elapsed_s = now_s - self._now_s
        if elapsed_s < SHORTEST_S:
            return
        fading_s = self._half_life_s / log(2)
        kept = exp(-elapsed_s / fading_s)
        weight_s = -expm1(-elapsed_s / fading_s) * fading_s  # what this interval's seconds count for at its end
        self._rows_X *= kept
        self._rows_X += self._arrived_X * (weight_s / elapsed_s)
        self._seconds = self._seconds * kept + weight_s
        self._arrived_X[:] = 0.0
        self._now_s = now_s

    def loads(self) -> list[list[float]]:
        """Rows per second of every layer's experts."""
        return self._by_layer((self._rows_X / self._seconds if self._seconds else self._rows_X).tolist())

    def totals(self) -> list[list[int]]:
        """Rows of every layer's experts that hosts reported, since the first reports."""
        return self._by_layer(self._total_X.tolist())

    def _by_layer(self, value_X: list[T]) -> list[list[T]]:
        return [value_X[start:stop] for start, stop in itertools.pairwise(self._starts)]
