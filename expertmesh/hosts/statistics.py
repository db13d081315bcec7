"""What a host reports of itself: values."""

from __future__ import annotations

from dataclasses import dataclass
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

    def plus(self, experts: int, rows: int, took_s: float) -> LaunchSums:
        """One launch more."""
        of_one = (1, experts, rows, took_s)
        products = (experts * experts, experts * rows, rows * rows, experts * took_s, rows * took_s)
        return LaunchSums(*map(sum, zip(self, (*of_one, *products), strict=True)))

    def since(self, earlier: LaunchSums) -> LaunchSums:
        """What came after `earlier`."""
        return LaunchSums(*(now - before for now, before in zip(self, earlier, strict=True)))


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
