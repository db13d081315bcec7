"""A gateway's places: never more than there are, given back however a request ends, and a wait that means something."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from expertmesh.engine.api import GenerateRequest, SamplingParams
from expertmesh.errors import ExpertMeshError, OverloadedError
from expertmesh.serve.admission import Admitting, Places
from expertmesh.testing.scripted import ScriptedBackend

REQUEST = GenerateRequest(request_id="r", prompt_ids=(1,), sampling=SamplingParams(max_tokens=2))


class Clock:
    """Stands still until told."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return self.now_s


def test_there_are_as_many_places_as_said_and_each_can_be_taken_again():
    places = Places(3, 2, Clock())
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(places.one())
        with pytest.raises(OverloadedError, match="3 sequences"), places.one():
            pass
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(places.one())


@pytest.mark.parametrize("seconds_per_answer", [0.5, 2.0])
def test_the_wait_is_the_queue_over_the_rate_at_which_answers_end(seconds_per_answer):
    clock = Clock()
    places = Places(10, 2, clock)
    for _ in range(20):
        with places.one():
            clock.now_s += seconds_per_answer
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(places.one())
        with pytest.raises(OverloadedError) as refused, places.one():
            pass
    assert refused.value.retry_after_s == pytest.approx(8 * seconds_per_answer, rel=0.1)


def test_what_ended_long_ago_says_nothing_of_the_rate():
    clock = Clock()
    places = Places(10, 2, clock)
    for _ in range(5):
        with places.one():
            clock.now_s += 10
    clock.now_s += 1000
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(places.one())
        assert places.wait_s == 1.0


def test_a_refusal_from_further_on_gets_the_wait_of_here():
    clock = Clock()
    places = Places(10, 2, clock)
    for _ in range(20):
        with places.one():
            clock.now_s += 1
    with ExitStack() as stack:
        for _ in range(9):
            stack.enter_context(places.one())
        with pytest.raises(OverloadedError) as refused, places.one():
            raise OverloadedError("the router is full", retry_after_s=1)
    assert refused.value.retry_after_s == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("steps", [(5, 6), (5, ExpertMeshError("it failed")), (5,)], ids=["ends", "fails", "is left"])
def test_a_place_is_given_back_however_the_request_ends(steps):
    admitting = Admitting(ScriptedBackend(lambda request: steps, vocab_size=9), Places(1, 1, Clock()))

    async def ask() -> None:
        events = admitting.generate(REQUEST)
        await anext(events)
        with pytest.raises(OverloadedError):
            await anext(admitting.generate(REQUEST))
        if len(steps) == 1:
            await events.aclose()
            return
        try:
            async for _ in events:
                pass
        except ExpertMeshError:
            assert isinstance(steps[1], ExpertMeshError)

    asyncio.run(ask())
    asyncio.run(ask())
