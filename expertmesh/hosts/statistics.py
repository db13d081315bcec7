"""What a host reports of itself: a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertmesh.ids import ExpertId


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatistics:
    """What a host has done since it started, and what it holds."""

    slots: tuple[int, ...]
    memory_bytes: int
    replicas: tuple[tuple[ExpertId, int], ...]
    """Each replica with the pairs it computed since it was loaded."""
    streams: int = 0
    """Routers connected."""
    at_s: float = 0.0
    """When this was read, by the host's own clock."""
    launches: int = 0
    rows: int = 0
    """Pairs computed."""
    busy_s: float = 0.0
    rows_squared: float = 0.0
    """The sum over launches of rows * rows: with the others, enough for a line through all of them."""
    rows_busy_s: float = 0.0
    """The sum over launches of rows * seconds."""
