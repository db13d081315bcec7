"""A clock that only a test moves."""

from __future__ import annotations


class ManualClock:
    """Starts at 0 s, and at 1,000,000 s of wall time."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    def wall(self) -> float:
        return 1_000_000.0 + self._now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, "time does not go back"
        self._now += seconds
