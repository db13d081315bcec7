"""Time as a value that can be passed in, so that every decision about time is testable."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Reads seconds."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start, never going back: for durations and deadlines."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch: for what people read."""
        ...


class SystemClock:
    """The machine's own clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()  # noqa: TID251 - the one place that may


SYSTEM_CLOCK = SystemClock()
