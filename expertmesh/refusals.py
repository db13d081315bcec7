"""Says in the log who was refused, once per peer and minute, however often they come back.

Owns how often something is said; knows nothing of why peers are refused. Invariant: neither the log nor the memory
that this takes grows with the number of attempts, nor with the number of peers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from expertmesh.clock import SYSTEM_CLOCK

if TYPE_CHECKING:
    import logging

    from expertmesh.clock import Clock

EVERY_S = 60.0
MAX_PEERS = 256
"""Named per `EVERY_S`; others are refused without a word."""


class RefusalLog:
    """Belongs to one event loop."""

    def __init__(self, logger: logging.Logger, clock: Clock = SYSTEM_CLOCK) -> None:
        self._logger = logger
        self._clock = clock
        self._said: dict[str, tuple[float, int]] = {}  # when a peer was named, and its attempts since; oldest first

    def refused(self, peer: str, why: str) -> None:
        """`peer` is an address without its port: what stays the same when it comes again."""
        now = self._clock.monotonic()
        said_at, attempts = self._said.get(peer, (-EVERY_S, 0))
        if now - said_at < EVERY_S:
            self._said[peer] = said_at, attempts + 1
            return
        self._forget(now, peer)
        if len(self._said) < MAX_PEERS:
            self._said[peer] = now, 0
            before = f" ({attempts} times more since it was last said)" if attempts else ""
            self._logger.warning("refused %s: %s%s", peer, why, before)

    def _forget(self, now: float, peer: str) -> None:
        """Those who were named long ago; and this one, which is to be last."""
        self._said.pop(peer, None)
        for known, (said_at, _) in list(self._said.items()):
            if now - said_at < EVERY_S:
                break
            del self._said[known]
