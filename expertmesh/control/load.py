"""What the hosts' counters say: how much load every expert has, and how fast every host is. Pure.

Hosts report how much they have done since they started, never how much since they were last asked, so that a report
that is lost costs nothing and one that comes twice or late is seen for what it is. Knows neither who asks the hosts
nor what is decided from the answer. Its invariant: every row that a replica counted between two reports that name it
is counted here exactly once, at the moment it became known.
"""

from __future__ import annotations

import itertools
from collections import deque
from math import exp, expm1, log
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np

from expertmesh.placement import TimeModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from expertmesh.ids import ExpertId, HostId

T = TypeVar("T")

MIN_SPREAD = 0.02
"""Launches whose sizes vary by less than this part of their mean tell nothing of how time grows with rows."""
MIN_LAUNCHES = 8
"""Fewer are no measurement."""


class HostCounters(Protocol):
    """What a host counts. All but `replicas` only ever grow while it lives."""

    @property
    def at_s(self) -> float:
        """When this was read, by the host's own clock: tells a late report from a new one."""
        ...

    @property
    def replicas(self) -> Iterable[tuple[ExpertId, int]]:
        """Each replica held, with the rows it computed since it was loaded."""
        ...

    @property
    def launches(self) -> int: ...
    @property
    def rows(self) -> int:
        """Rows of all launches."""
        ...

    @property
    def rows_squared(self) -> float:
        """The sum over launches of rows * rows."""
        ...

    @property
    def busy_s(self) -> float:
        """Seconds of all launches."""
        ...

    @property
    def rows_busy_s(self) -> float:
        """The sum over launches of rows * seconds."""
        ...


class LoadMeter:
    """Smoothed load of every expert, and a time model of every host.

    Feed it with `observe`, whenever a report comes; `tick` then moves time forward. Only `tick` changes what `loads`
    says.
    """

    def __init__(self, num_experts: Sequence[int], *, half_life_s: float = 30.0, model_window_s: float = 300.0) -> None:
        """Loads half as old as `half_life_s` count half; hosts are judged by their last `model_window_s` seconds."""
        self._starts = (0, *itertools.accumulate(num_experts))
        self._half_life_s = half_life_s
        self._model_window_s = model_window_s
        self._hosts: dict[HostId, _Host] = {}
        self._now_s: float | None = None
        # X counts the experts of all layers, one layer after the other.
        self._arrived_X = np.zeros(self._starts[-1])
        self._rows_X = np.zeros(self._starts[-1])
        self._total_X = np.zeros(self._starts[-1], dtype=np.int64)
        self._seconds = 0.0

    def observe(self, host: HostId, counters: HostCounters) -> None:
        """Take in one report, in whatever order they come. Cost: one step per replica.

        A host's first report is what its later ones are measured against; a replica that appears later counts from
        zero, and so does one whose count fell, for it was loaded anew.
        """
        known = self._hosts.get(host)
        if known is None:
            known = self._hosts[host] = _Host(counters.at_s, dict(counters.replicas))
        elif counters.at_s > known.at_s:
            replicas = dict(counters.replicas)
            for expert, rows in replicas.items():
                before = known.replicas.get(expert, 0)
                more = rows - before if rows >= before else rows
                self._arrived_X[self._starts[expert.layer] + expert.index] += more
                self._total_X[self._starts[expert.layer] + expert.index] += more
            known.at_s, known.replicas = counters.at_s, replicas
        else:
            return
        known.add(Sums.of(counters), self._model_window_s)

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
        if elapsed_s <= 0:
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

    def time_model(self, host: HostId) -> TimeModel | None:
        """How long the host's launches take, once enough of them were seen."""
        return self._hosts[host].time_model if host in self._hosts else None

    def rate(self, host: HostId, batch_rows: float) -> float:
        """Rows per second in launches of `batch_rows`. An unmeasured host is taken for the median of the measured.

        1.0 while none is measured.
        """
        model = self.time_model(host)
        if model is not None:
            return batch_rows / (model.launch_s + model.row_s * batch_rows)
        measured = [known for known, state in self._hosts.items() if state.time_model is not None]
        return float(np.median([self.rate(known, batch_rows) for known in measured])) if measured else 1.0

    def batch_rows(self) -> float | None:
        """Rows of the mean launch of all hosts of late, at which rates compare; None before any was seen."""
        recent = [state.recent for state in self._hosts.values()]
        launches = sum(sums.launches for sums in recent)
        return sum(sums.rows for sums in recent) / launches if launches else None


class Sums(NamedTuple):
    """A host's counters of launches: enough for a line through all of them."""

    at_s: float
    launches: float
    rows: float
    rows_squared: float
    busy_s: float
    rows_busy_s: float

    @staticmethod
    def of(counters: HostCounters) -> Sums:
        return Sums(*(getattr(counters, name) for name in Sums._fields))

    def since(self, earlier: Sums) -> Sums:
        return Sums(*(now - before for now, before in zip(self, earlier, strict=True)))


class _Host:
    """What is known of one host."""

    def __init__(self, at_s: float, replicas: dict[ExpertId, int]) -> None:
        self.at_s = at_s
        self.replicas = replicas
        self.time_model: TimeModel | None = None
        self._history: deque[Sums] = deque()

    @property
    def recent(self) -> Sums:
        """What the host did within the window."""
        return self._history[-1].since(self._history[0])

    def add(self, sums: Sums, window_s: float) -> None:
        if self._history and sums.launches < self._history[-1].launches:
            self._history.clear()  # it was configured anew, and counts from zero
        self._history.append(sums)
        while len(self._history) > 2 and self._history[1].at_s < sums.at_s - window_s:
            self._history.popleft()
        if self.recent.launches >= MIN_LAUNCHES:
            self.time_model = fit(self.recent, self.time_model)


def fit(sums: Sums, earlier: TimeModel | None) -> TimeModel | None:
    """The least-squares line through all launches, with neither figure below zero.

    When the launches were all of about one size, any line through that point fits. Then the split of `earlier` is
    kept, scaled to the time now seen; without it, all time is put down to rows.
    """
    n, x, y = sums.launches, sums.rows, sums.busy_s
    if x == 0 or y <= 0:
        return earlier
    spread = n * sums.rows_squared - x * x  # n^2 times the variance of the sizes
    if spread <= (MIN_SPREAD * x) ** 2:
        if earlier is None:
            return TimeModel(0.0, y / x)
        scale = y / (n * earlier.launch_s + x * earlier.row_s)
        return TimeModel(earlier.launch_s * scale, earlier.row_s * scale)
    row_s = (n * sums.rows_busy_s - x * y) / spread
    if row_s <= 0:
        return TimeModel(y / n, 0.0)
    launch_s = (y - row_s * x) / n
    if launch_s < 0:
        return TimeModel(0.0, sums.rows_busy_s / sums.rows_squared)
    return TimeModel(launch_s, row_s)
