"""What long work says of itself while it goes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far some work has come: `done` of `total` of something, where that is known."""

    phase: str
    done: int = 0
    total: int = 0
