"""The decision log: what the controller did and why, for people. Bounded; the newest last."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertmesh.clock import Clock

logger = logging.getLogger(__name__)

KEPT = 1000


class Journal:
    """Entries as JSON-able dicts: time (seconds since the Unix epoch), what, why, and what else is known."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entries: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def add(self, what: str, why: str, **more: Any) -> None:
        """Note one decision. The same again, right after itself, is only counted, and what else is known brought up to
        date."""
        if self._entries and (self._entries[-1]["what"], self._entries[-1]["why"]) == (what, why):
            self._entries[-1] |= {"times": self._entries[-1].get("times", 1) + 1, **more}
            return
        logger.info("%s: %s", what, why)
        self._entries.append({"time": self._clock.wall(), "what": what, "why": why, **more})

    def entries(self) -> list[dict[str, Any]]:
        return list(self._entries)
