"""A router's doubt about a replica, as it tells the controller. A value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertmesh.ids import ExpertId, HostId


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """A replica answered what it never should have."""

    expert: ExpertId
    host: HostId
    cause: str
    """In words for the decision log: what was wrong with its rows."""
