"""Answers that carry each other's events: whatever is emitted, sent, delivered and broken off, in whatever order."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque

from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.engine.api import FINISH_LENGTH, TokenEvent
from expertmesh.serve.relay import REPEATED, Inbox, Outbox

REQUESTS = [f"r{number}" for number in range(5)]
STEPS = st.lists(
    st.tuples(st.sampled_from(["say", "end", "send", "arrive", "leave"]), st.sampled_from(REQUESTS)), max_size=250
)


class Wire:
    """A router and a gateway, with messages on their way between them: each answer's in order, and no others'."""

    def __init__(self) -> None:
        self.outbox, self.inbox = Outbox(), Inbox()
        self.writing = {request: self.outbox.open(request) for request in REQUESTS}
        self.reading = {request: self.inbox.expect(request) for request in REQUESTS}
        self.on_their_way: dict[str, deque] = defaultdict(deque)
        self.said: dict[str, list[TokenEvent]] = defaultdict(list)
        self.has_ended: set[str] = set()

    def say(self, request: str, finish_reason: str | None = None) -> None:
        if request in self.has_ended or (finish_reason is None and len(self.said[request]) >= REPEATED - 1):
            return
        event = TokenEvent(request_id=request, token_id=len(self.said[request]), finish_reason=finish_reason)
        self.said[request].append(event)
        self.outbox.put(event)
        if finish_reason:
            self.has_ended.add(request)

    def end(self, request: str) -> None:
        self.say(request, FINISH_LENGTH)

    def send(self, request: str) -> None:
        if request in self.writing and self.writing[request].news.is_set():
            self.on_their_way[request].append(self.writing[request].take())
            if self.writing[request].is_told:
                self.outbox.close(request)
                del self.writing[request]

    def arrive(self, request: str) -> None:
        if self.on_their_way[request]:
            self.inbox.put(self.on_their_way[request].popleft())

    def leave(self, request: str) -> None:
        """The client is gone: nobody reads what is on its way, for whomever it was."""
        if request in self.writing and request in self.reading:
            self.inbox.forget(request)
            self.on_their_way[request].clear()
            self.outbox.close(request)
            self.has_ended.add(request)
            del self.writing[request], self.reading[request]

    def finish(self) -> None:
        for request in REQUESTS:
            self.end(request)
        while self.writing or any(self.on_their_way.values()):
            for request in REQUESTS:
                self.send(request)
                self.arrive(request)


async def all_of(incoming) -> list[TokenEvent]:
    incoming.end(None)
    events = []
    while (news := await incoming.next()) is not None:
        events += news
    return events


@settings(max_examples=300, deadline=None)
@given(steps=STEPS)
def test_every_request_that_stays_sees_its_events_in_order_and_once(steps) -> None:
    wire = Wire()
    for step, request in steps:
        getattr(wire, step)(request)
    wire.finish()
    for request, incoming in wire.reading.items():
        assert asyncio.run(all_of(incoming)) == wire.said[request]
    assert wire.outbox.is_empty


def test_one_message_carries_what_all_requests_have_to_say() -> None:
    wire = Wire()
    for request in REQUESTS:
        wire.say(request)
    assert [request for request in REQUESTS if wire.writing[request].news.is_set()] == REQUESTS[:1]
    assert len(wire.writing[REQUESTS[0]].take()) == len(REQUESTS)


def test_what_was_on_its_way_with_a_broken_answer_is_said_again_by_the_next() -> None:
    wire = Wire()
    for request in REQUESTS:
        wire.say(request)
    wire.send(REQUESTS[0])
    wire.leave(REQUESTS[0])
    assert [event.request_id for _, event in wire.writing[REQUESTS[1]].take()] == REQUESTS[1:]


def test_an_answer_that_broke_off_raises_why_after_what_had_come() -> None:
    async def read() -> None:
        wire = Wire()
        wire.say("r0")
        wire.send("r0")
        wire.arrive("r0")
        incoming = wire.reading["r0"]
        incoming.end(ConnectionError("gone"))
        assert await incoming.next() == wire.said["r0"]
        try:
            await incoming.next()
        except ConnectionError:
            return
        raise AssertionError("it did not say why")

    asyncio.run(read())
