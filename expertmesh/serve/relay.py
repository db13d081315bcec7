"""Tokens on their way from a router to a gateway: one message for each step, whichever requests the tokens are for.

A message between them costs far more than the tokens in it. So every request has an answer of its own, a stream of
messages, and the oldest that is open carries what is new of all; the others keep silent until their own end.

Owns both ends. Does not know what carries messages. Invariant: a request sees its events in order, each once, whichever
answers brought them, as long as its own answer is open and fewer than `REPEATED` of its events are lost at once. Its
end comes in its own answer, with the latest events before it; and when an answer is closed before its end, so that what
it carried may never arrive, the next to carry repeats the latest events of all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from expertmesh.engine.api import TokenEvent

Message: TypeAlias = "list[tuple[int, TokenEvent]]"
"""Events, each with how many of its request came before it. Empty: all there is to say is that work goes on."""

REPEATED = 32
"""Events of a request that are said again where they may have been lost."""


class Outbox:
    """A router's end: the answers that it owes one gateway. For one thread."""

    def __init__(self) -> None:
        self._open: dict[str, Outgoing] = {}
        """By request id; the first is the one that carries."""

    @property
    def is_empty(self) -> bool:
        return not self._open

    def open(self, request_id: str) -> Outgoing:
        """Begin the answer to a request. Close it in any case."""
        assert request_id not in self._open, "the engine takes an id only once"
        outgoing = self._open[request_id] = Outgoing()
        return outgoing

    def put(self, event: TokenEvent) -> None:
        """Have an event said. One of a request whose answer is closed is dropped."""
        outgoing = self._open.get(event.request_id)
        if outgoing is None:
            return
        numbered = outgoing.number(event)
        if event.finish_reason is not None:
            outgoing.say([*outgoing.latest, numbered])
            outgoing.is_ending = True
        else:
            outgoing.latest.append(numbered)
            self._carrier().say([numbered])

    def close(self, request_id: str) -> None:
        """End an answer: of itself, or because nobody reads it any more."""
        was_carrier = next(iter(self._open)) == request_id
        closed = self._open.pop(request_id)
        if not was_carrier or not self._open:
            return
        if closed.is_told:
            self._carrier().say(closed.take())
        else:
            self._carrier().say([numbered for other in self._open.values() for numbered in other.latest])

    def _carrier(self) -> Outgoing:
        return next(iter(self._open.values()))


class Outgoing:
    """One answer, as the router writes it."""

    def __init__(self) -> None:
        self.latest: deque[tuple[int, TokenEvent]] = deque(maxlen=REPEATED)
        self.news = asyncio.Event()
        """Set while there is something to take."""
        self.is_ending = False
        self.is_told = False
        """Whether all has been taken, its end too."""
        self._message: Message = []
        self._num_events = 0

    def number(self, event: TokenEvent) -> tuple[int, TokenEvent]:
        self._num_events += 1
        return self._num_events - 1, event

    def say(self, events: Message) -> None:
        if events:
            self._message += events
            self.news.set()

    def take(self) -> Message:
        """The next message, which is empty if there is no news."""
        self.is_told = self.is_ending
        self.news.clear()
        message, self._message = self._message, []
        return message


class Inbox:
    """A gateway's end: the answers that it awaits, from all routers. For one thread."""

    def __init__(self) -> None:
        self._awaited: dict[str, Incoming] = {}

    def expect(self, request_id: str) -> Incoming:
        """Await the answer to a request. Forget it in any case."""
        incoming = self._awaited[request_id] = Incoming()
        return incoming

    def forget(self, request_id: str) -> None:
        del self._awaited[request_id]

    def put(self, message: Message) -> None:
        """Take what an answer brought, for whomever it is."""
        for number, event in message:
            incoming = self._awaited.get(event.request_id)
            if incoming is not None:
                incoming.put(number, event)


class Incoming:
    """One answer, as the gateway reads it."""

    def __init__(self) -> None:
        self._next = 0
        self._early: dict[int, TokenEvent] = {}
        self._ready: list[TokenEvent] = []
        self._news = asyncio.Event()
        self._is_beating = False
        self._is_over = False
        self._error: BaseException | None = None

    def put(self, number: int, event: TokenEvent) -> None:
        """Take an event of it, be it early, late or said before."""
        if number < self._next:
            return
        self._early[number] = event
        while self._next in self._early:
            self._ready.append(self._early.pop(self._next))
            self._next += 1
            self._news.set()

    def beat(self) -> None:
        """Its router has spoken up."""
        self._is_beating = True
        self._news.set()

    def end(self, error: BaseException | None) -> None:
        """Nothing more comes in its own answer, because of `error` if there is one."""
        self._is_over, self._error = True, error
        self._news.set()

    async def next(self) -> list[TokenEvent] | None:
        """Wait for the next events, none of which may mean that the router has spoken up; None after the last.

        Raises what ended the answer.
        """
        while not (self._ready or self._is_over or self._is_beating):
            self._news.clear()
            await self._news.wait()
        self._is_beating = False
        if self._ready or not self._is_over:
            events, self._ready = self._ready, []
            return events
        if self._error is not None:
            raise self._error
        return None
