"""How fast hosts are, from what their launches took. Pure.

Hosts of a pool are alike, so one linear model is fitted to all their launches: what a launch costs, each distinct
expert in it, each row. So a host is judged by its device and not by what the gate happened to send it. One may still
be slower than its fellows, hotter or shared with others; then it gets a factor.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from expertmesh.hosts.statistics import NOTHING, LaunchSums
from expertmesh.placement import TimeModel

if TYPE_CHECKING:
    from expertmesh.ids import HostId

MIN_LAUNCHES = 8
"""Fewer are no measurement."""
ALIKE, ALIKE_AGAIN = 1.3, 1.15
"""A host that differs from its pool by more than the first factor is judged by itself, until within the second."""
LEAST_FOR_ROWS = 1e-3
"""Part of all time that rows take at least."""
TOLERANCE = 1e-3
"""A model with more terms must explain this part more of what the launches took."""


class SpeedMeter:
    """A time model of every host. Feed it with `observe`, in whatever order reports come."""

    def __init__(self, *, window_s: float = 30.0) -> None:
        """Hosts are judged by what they did in the last `window_s` seconds."""
        self._window_s = window_s
        self._pools: dict[HostId, str] = {}
        self._history: dict[HostId, deque[tuple[float, LaunchSums]]] = {}
        self._shapes: dict[str, TimeModel] = {}
        self._totals: dict[str, LaunchSums] = {}
        """Of each pool, what its hosts did within the window."""
        self._unlike: set[HostId] = set()
        """The hosts that are not like the others of their pool."""

    def observe(self, host: HostId, pool: str, at_s: float, done: LaunchSums) -> None:
        """Take in what a host has done up to `at_s` of its own clock. An older report than the last changes nothing."""
        history = self._history.setdefault(host, deque())
        if history and at_s <= history[-1][0]:
            return
        before = self._recent(host)
        self._pools[host] = pool
        if history and done.launches < history[-1][1].launches:
            history.clear()  # it was configured anew, and counts from zero
        history.append((at_s, done))
        while len(history) > 2 and history[1][0] < at_s - self._window_s:
            history.popleft()
        self._totals[pool] = self._totals.get(pool, NOTHING).plus(self._recent(host).since(before))
        shape = fit(self._totals[pool])
        if shape is not None:
            self._shapes[pool] = shape
        self._judge(host)

    def forget(self, host: HostId) -> None:
        """The host is gone for good."""
        if (pool := self._pools.pop(host, None)) is not None:
            self._totals[pool] = self._totals[pool].since(self._recent(host))
        self._history.pop(host, None)
        self._unlike.discard(host)

    def _recent(self, host: HostId) -> LaunchSums:
        history = self._history.get(host)
        return history[-1][1].since(history[0][1]) if history else NOTHING

    def time_model(self, host: HostId) -> TimeModel | None:
        """How long the host's launches take; while it has made too few, that of its pool. None: nobody has."""
        shape = self._shapes.get(self._pools.get(host, ""))
        if shape is None or host not in self._unlike:
            return shape
        factor = self._factor(host)
        return TimeModel(shape.launch_s * factor, shape.row_s * factor, shape.expert_s * factor)

    def _factor(self, host: HostId) -> float:
        """How many times as long as its pool's model says the host takes; 1 while it has made too few launches."""
        shape, recent = self._shapes.get(self._pools[host]), self._recent(host)
        if shape is None or recent.launches < MIN_LAUNCHES:
            return 1.0
        expected_s = shape.seconds(recent.rows, recent.experts) + shape.launch_s * (recent.launches - 1)
        return recent.busy_s / expected_s

    def _judge(self, host: HostId) -> None:
        """Hosts of a pool are alike until one clearly is not: a placement that follows noise is never at rest."""
        within = ALIKE_AGAIN if host in self._unlike else ALIKE
        if 1 / within < self._factor(host) < within:
            self._unlike.discard(host)
        else:
            self._unlike.add(host)

    def rate(self, host: HostId) -> float:
        """Rows per second in the mean launch of all hosts, so that rates compare. 1.0 while nothing is measured.

        A host of which nothing is known is taken for the median of the others.
        """
        mean = functools.reduce(LaunchSums.plus, self._totals.values(), NOTHING)
        if not mean.launches or not mean.rows:
            return 1.0
        rows, experts = mean.rows / mean.launches, mean.experts / mean.launches
        models = [self.time_model(host)]
        if models == [None]:
            models = [self.time_model(known) for known in self._pools]
        rates = [rows / model.seconds(rows, experts) for model in models if model is not None]
        return float(np.median(rates)) if rates else 1.0


_SIMPLEST_FIRST = tuple(terms for size in (1, 2, 3) for terms in itertools.combinations((2, 1, 0), size))
"""Sets of the terms rows (2), experts (1) and launch (0)."""


def fit(sums: LaunchSums) -> TimeModel | None:
    """The least-squares model of launches without negative figures; None when they are too few.

    Of models that explain the times about as well, the one with the fewest terms, of rows rather than experts rather
    than launches: what never varied cannot be told apart.
    """
    n, e, r = sums.launches, sums.experts, sums.rows
    if n < MIN_LAUNCHES or r <= 0 or sums.busy_s <= 0:
        return None
    products = np.array(
        [[n, e, r], [e, sums.experts_squared, sums.experts_rows], [r, sums.experts_rows, sums.rows_squared]]
    )
    times = np.array([sums.busy_s, sums.experts_busy_s, sums.rows_busy_s])
    best, best_gain = None, 0.0
    for terms in _SIMPLEST_FIRST:
        of, to = products[np.ix_(terms, terms)], times[list(terms)]
        scale = 1 / np.sqrt(np.diag(of).clip(1e-30))
        if np.linalg.cond(of * np.outer(scale, scale)) > 1e6:
            continue
        figures = np.linalg.solve(of, to)
        gain = float(figures @ to)  # how much of the sum of squared times it explains
        if (figures >= 0).all() and (best is None or gain > best_gain * (1 + TOLERANCE)):
            best, best_gain = dict(zip(terms, figures.tolist(), strict=True)), gain
    if best is None:
        return None
    # No row is free, however little it shows: whoever divides work by rows needs some figure.
    row_s = max(best.get(2, 0.0), LEAST_FOR_ROWS * sums.busy_s / r)
    return TimeModel(launch_s=best.get(0, 0.0), row_s=row_s, expert_s=best.get(1, 0.0))
