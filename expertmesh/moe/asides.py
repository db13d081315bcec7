"""Requests under way whose answers no exchange waits for, but which say how a host does.

Three kinds: those that another host overtook, probes, and second opinions. Knows nothing of what they mean: each has
somebody to tell. Invariant: whoever is to be told is told once, of an answer or of none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmesh.transport import LayerReply

if TYPE_CHECKING:
    from collections.abc import Callable

    from expertmesh.transport import Transport

    Then = Callable[[LayerReply | None, float], None]
    """Told of the reply and the seconds it took; None: none came, or an error."""


@dataclass(slots=True)
class _Aside:
    sent_at: float
    timeout_s: float
    then: Then
    runs: int = 0
    """Exchanges that have ended since it was sent."""


class Asides:
    """All of one exchange's, by ticket. Their answers are read only while an exchange runs."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._asides: dict[int, _Aside] = {}
        self._read_until = 0.0

    def __len__(self) -> int:
        return len(self._asides)

    def watch(self, ticket: int, sent_at: float, timeout_s: float, then: Then) -> None:
        self._asides[ticket] = _Aside(sent_at, timeout_s, then)

    def take(self, ticket: int, outcome: object, now: float) -> None:
        """An answer has come."""
        aside = self._asides.pop(ticket, None)
        if aside is None:
            return
        # It may have waited for us to read it: in doubt, it came right after we last read.
        came_at = max(self._read_until, aside.sent_at) if aside.runs else now
        aside.then(outcome if isinstance(outcome, LayerReply) else None, came_at - aside.sent_at)

    def run_ended(self, now: float) -> None:
        """Nobody reads from now on until the next exchange. Those that had their time and still have no answer get
        none: two exchanges must have looked for it, lest it lie there unread."""
        self._read_until = now
        for ticket, aside in list(self._asides.items()):
            aside.runs += 1
            if aside.runs > 2 and now - aside.sent_at >= aside.timeout_s:
                self._transport.forget(ticket)
                del self._asides[ticket]
                aside.then(None, now - aside.sent_at)
