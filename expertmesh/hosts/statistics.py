"""What a host reports of itself: values."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from expertmesh.ids import ExpertId


class LaunchSums(NamedTuple):
    """What launches came to, summed over all of them: enough for the best linear model of a launch's time."""

    launches: float = 0.0
    experts: float = 0.0
    """Distinct experts of a launch."""
    rows: float = 0.0
    """Pairs computed."""
    busy_s: float = 0.0
    experts_squared: float = 0.0
    experts_rows: float = 0.0
    rows_squared: float = 0.0
    experts_busy_s: float = 0.0
    rows_busy_s: float = 0.0

    def plus(self, other: LaunchSums) -> LaunchSums:
        """Both together."""
        return LaunchSums(*(a + b for a, b in zip(self, other, strict=True)))

    def since(self, earlier: LaunchSums) -> LaunchSums:
        """What came after `earlier`."""
        return LaunchSums(*(now - before for now, before in zip(self, earlier, strict=True)))


@dataclass(slots=True)
class LaunchCounter:
    """`LaunchSums` in the making: each launch adds to them, and nothing else that short may cost much."""

    launches: int = 0
    experts: int = 0
    rows: int = 0
    busy_s: float = 0.0
    experts_squared: int = 0
    experts_rows: int = 0
    rows_squared: int = 0
    experts_busy_s: float = 0.0
    rows_busy_s: float = 0.0

    def add(self, experts: int, rows: int, took_s: float) -> None:
        """One launch more."""
        self.launches += 1
        self.experts += experts
        self.rows += rows
        self.busy_s += took_s
        self.experts_squared += experts * experts
        self.experts_rows += experts * rows
        self.rows_squared += rows * rows
        self.experts_busy_s += experts * took_s
        self.rows_busy_s += rows * took_s

    def sums(self) -> LaunchSums:
        """As they are now."""
        return LaunchSums(*astuple(self))


NOTHING = LaunchSums()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatistics:
    """What a host has done since it started, and what it holds."""

    slots: tuple[int, ...]
    memory_bytes: int
    replicas: tuple[tuple[ExpertId, int], ...]
    """Each replica with the pairs it computed since it was loaded."""
    done: LaunchSums = NOTHING
    streams: int = 0
    """Routers connected."""
    at_s: float = 0.0
    """When this was read, by the host's own clock."""
