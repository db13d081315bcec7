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
    launches: int
    rows: int
    busy_s: float
