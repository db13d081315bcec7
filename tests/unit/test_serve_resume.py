"""Requests whose routers end under them: whatever the cuts, the caller sees the undisturbed answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.engine.api import FINISH_ERROR, GenerateRequest, PromptLogprobs, SamplingParams, TokenEvent
from expertmesh.errors import ExpertMeshError, InvalidRequestError, NoRouterError, OverloadedError, RouterGoneError
from expertmesh.gates.spec import GateSpec
from expertmesh.serve.backend import Limits, ModelCard
from expertmesh.serve.openai_api import create_app
from expertmesh.serve.resume import Patience, Resuming
from expertmesh.serve.text import TextCodec
from expertmesh.testing.scripted import ScriptedBackend
from expertmesh.testing.tokenizers import byte_level_tokenizer

VOCABULARY, EOS = 420, 1
PATIENCE = Patience(no_router_s=5, silence_s=0.05, falls=1000, first_pause_s=0)
WAYS = ("raised", "said", "broke off", "silent")


def model(request: GenerateRequest) -> Iterator[int]:
    """A next token that depends on all that it may: every token before, which of them were generated, and the seed."""
    ids, sampling = list(request.prompt_ids), request.sampling
    num_prompt = len(ids) - request.num_resumed
    while True:
        seen = sum(ids[num_prompt:]) * bool(sampling.presence_penalty) + len(ids[num_prompt:])
        token = (ids[-1] * 31 + len(ids) * 17 + sampling.seed * 7 + seen) % (VOCABULARY - 6) + 6
        ids.append(EOS if sampling.seed % 3 == 0 and token % 11 == 0 else token)
        yield ids[-1]


@dataclass
class Falling:
    """Routers of which the n-th says as many tokens, in lists of a size, as the n-th of `falls` and then ends so."""

    falls: list[tuple[int, str]]
    size: int = 1
    requests: list[GenerateRequest] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenEvent], None]:
        number = len(self.requests)
        self.requests.append(request)
        num_tokens, way = self.falls[number] if number < len(self.falls) else (10**9, "")
        events: list[TokenEvent] = []
        async for batch in ScriptedBackend(model, vocab_size=VOCABULARY, eos_token_ids=[EOS]).generate(request):
            for event in batch:
                if num_tokens == 0:
                    async for last in self._fall(events, way):
                        yield last
                    return
                num_tokens -= 1
                events.append(event)
            if len(events) >= self.size or events[-1].finish_reason:
                yield events
                events = []
                yield []
            if batch[-1].finish_reason:
                return

    async def _fall(self, events: list[TokenEvent], way: str) -> AsyncGenerator[list[TokenEvent], None]:
        gone = RouterGoneError("its process ended")
        if way == "said":
            end = TokenEvent(request_id="other", finish_reason=FINISH_ERROR, error=str(gone), cause=gone)
            yield [*events, end]
            return
        yield events
        if way == "raised":
            raise gone
        if way == "silent":
            await asyncio.Event().wait()

    async def score(
        self, prompt_ids: tuple[int, ...], top_logprobs: int, gate: GateSpec | None = None
    ) -> PromptLogprobs:
        self.requests.append(
            GenerateRequest(request_id="", prompt_ids=prompt_ids, sampling=SamplingParams(max_tokens=1))
        )
        if len(self.requests) <= len(self.falls):
            raise RouterGoneError("its process ended")
        return PromptLogprobs(token_logprobs=(None,), top_logprobs=((),))


def said(backend: object, request: GenerateRequest, patience: Patience = PATIENCE) -> list[TokenEvent]:
    async def listen() -> list[TokenEvent]:
        batches = Resuming(backend, patience, SYSTEM_CLOCK).generate(request)
        return [event async for events in batches for event in events]

    return asyncio.run(listen())


def request(seed: int = 1, max_tokens: int = 12, **sampling) -> GenerateRequest:
    return GenerateRequest(
        request_id="r", prompt_ids=(9, 8, 7), sampling=SamplingParams(max_tokens=max_tokens, seed=seed, **sampling)
    )


@given(
    seed=st.integers(0, 2**63 - 1),
    max_tokens=st.integers(1, 30),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    top_logprobs=st.sampled_from([None, 0, 3]),
    falls=st.lists(st.tuples(st.integers(0, 8), st.sampled_from(WAYS[:3])), max_size=8),
    size=st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_whatever_the_cuts_the_events_are_those_of_one_undisturbed_request(falls, size, **sampling):
    assert said(Falling(falls, size), request(**sampling)) == said(Falling([]), request(**sampling))


@pytest.mark.parametrize("way", WAYS)
def test_every_cut_is_seamless_however_the_router_ends(way):
    whole = said(Falling([]), request())
    for cut in range(len(whole)):
        backend = Falling([(cut, way)])
        assert said(backend, request()) == whole
        first, second = backend.requests
        assert second.prompt_ids == (9, 8, 7, *(event.token_id for event in whole[:cut]))
        assert (second.num_resumed, second.sampling) == (cut, first.sampling)
        assert second.request_id != first.request_id  # the router before may still hold it


def test_a_router_that_only_says_that_it_works_is_waited_for():
    class Busy(Falling):
        async def generate(self, request):
            for _ in range(10):
                await asyncio.sleep(0.02)
                yield []
            async for events in super().generate(request):
                yield events

    backend = Busy([])
    assert len(said(backend, request(), Patience(no_router_s=0.1, silence_s=0.1))) == 12
    assert len(backend.requests) == 1


def test_a_request_waits_for_a_router_and_then_says_that_there_is_none():
    class Nobody(Falling):
        async def generate(self, request):
            self.requests.append(request)
            await asyncio.Event().wait()
            yield []

    backend = Nobody([])
    with pytest.raises(NoRouterError, match=r"within 0\.2 s"):
        said(backend, request(), Patience(no_router_s=0.2, silence_s=0.05))
    assert len(backend.requests) >= 3, "one that hangs on its way must be sent again"


def test_a_request_that_ends_router_after_router_is_given_up():
    backend = Falling([(0, "raised")] * 100)
    with pytest.raises(NoRouterError, match="5 routers in a row"):
        said(backend, request(), Patience(no_router_s=5, first_pause_s=0))
    assert len(backend.requests) == 5


@pytest.mark.parametrize("error", [InvalidRequestError("no"), OverloadedError("full"), ExpertMeshError("defect")])
def test_an_error_of_the_requests_own_is_not_tried_again(error):
    backend = ScriptedBackend(lambda request: [error], vocab_size=VOCABULARY)
    with pytest.raises(type(error)):
        said(backend, request())
    assert len(backend.requests) == 1


def test_a_request_that_was_taken_once_waits_where_a_new_one_is_refused():
    class FullAtFirst(Falling):
        async def generate(self, request):
            if 0 < len(self.requests) < 4:
                self.requests.append(request)
                raise OverloadedError("full")
            async for events in super().generate(request):
                yield events

    backend = FullAtFirst([(5, "raised")])
    assert said(backend, request()) == said(Falling([]), request())
    assert len(backend.requests) == 5


def test_leaving_early_cancels_the_attempt_that_is_under_way():
    backend = ScriptedBackend(lambda request: [20, 21], vocab_size=VOCABULARY)

    async def leave() -> None:
        batches = Resuming(backend, PATIENCE, SYSTEM_CLOCK).generate(request())
        await anext(batches)
        await batches.aclose()

    asyncio.run(leave())
    assert backend.cancelled.get_nowait() == "r"


def test_a_prompts_score_is_asked_for_again():
    backend = Falling([(0, "raised")] * 3)
    scored = asyncio.run(Resuming(backend, PATIENCE, SYSTEM_CLOCK).score((1, 2), 0))
    assert scored.token_logprobs == (None,)
    assert len(backend.requests) == 4


CARD = ModelCard(name="tiny", root="tiny", max_context=64, vocab_size=VOCABULARY, created=7, eos_token_ids=(EOS,))
CODEC = TextCodec(byte_level_tokenizer())


class Mesh:
    """An HTTP surface whose routers fall as the test says."""

    def __init__(self) -> None:
        self.routers = Falling([])
        app = create_app(Resuming(self, PATIENCE, SYSTEM_CLOCK), CARD, CODEC, Limits())
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")

    def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenEvent], None]:
        return self.routers.generate(request)


async def answer(mesh: Mesh, falls: list[tuple[int, str]], **fields) -> dict:
    """A streamed completion, put together."""
    mesh.routers = Falling(falls)
    body = {"prompt": [9, 8, 7], "max_tokens": 24, "seed": 1, "stream": True, "return_token_ids": True}
    response = await mesh.http.post("/v1/completions", json=body | fields)
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line)["choices"][0] for line in lines]
    return {
        "text": "".join(chunk["text"] for chunk in chunks),
        "ids": [i for chunk in chunks for i in chunk["token_ids"]],
        "logprobs": [value for chunk in chunks for value in (chunk["logprobs"] or {}).get("token_logprobs", [])],
        "offsets": [value for chunk in chunks for value in (chunk["logprobs"] or {}).get("text_offset", [])],
        "end": (chunks[-1]["finish_reason"], chunks[-1]["stop_reason"]),
    }


@pytest.mark.asyncio
async def test_a_stream_is_the_same_wherever_it_is_cut_also_within_a_stop_string():
    mesh = Mesh()
    whole = await answer(mesh, [])
    stop = whole["text"][8:14]
    fields = {"logprobs": 2, "presence_penalty": 1}
    undisturbed, stops_early = await answer(mesh, [], **fields), await answer(mesh, [], stop=stop)
    assert stops_early["end"] == ("stop", stop)
    for cut in range(len(whole["ids"])):
        assert await answer(mesh, [(cut, "raised"), (1, "said")], **fields) == undisturbed
        assert await answer(mesh, [(cut, "broke off")], stop=stop) == stops_early
