"""The HTTP surface over a real engine and model: what clients read is what the model itself says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch

from expertmesh.engine import EngineConfig, make_engine
from expertmesh.engine.api import Engine, GenerateRequest, PromptLogprobs, TokenEvent
from expertmesh.serve.backend import Limits, ModelCard
from expertmesh.serve.openai_api import create_app
from expertmesh.serve.text import TextCodec
from expertmesh.testing.tokenizers import byte_level_tokenizer
from tests.architectures.checkpoints import Architecture, build_model

pytestmark = pytest.mark.asyncio

CODEC = TextCodec(byte_level_tokenizer())
VOCAB, CONTEXT, MAX_QUEUE = 420, 96, 8
PROMPT = "The gate picks"


class EngineBackend:
    """One engine in this process as the token plane."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenEvent], None]:
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._engine.submit(request, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        try:
            finish_reason = None
            while finish_reason is None:
                event = await events.get()
                finish_reason = event.finish_reason
                yield [event]
        finally:
            self._engine.cancel(request.request_id)

    async def score(self, prompt_ids: tuple[int, ...], top_logprobs: int) -> PromptLogprobs:
        return await asyncio.to_thread(self._engine.score, prompt_ids, top_logprobs)


@pytest.fixture(scope="module")
def model() -> Any:
    architecture = Architecture(experts_class="", model_type="qwen3_moe", auto_class=None)
    return build_model(architecture, vocab_size=VOCAB)


LIMITS = EngineConfig(
    max_requests=4,
    max_context=CONTEXT,
    max_batch_tokens=32,
    max_queue=MAX_QUEUE,
    kv_tokens=4 * CONTEXT,
    page_size=8,
)


@pytest.fixture(scope="module")
def engine(model) -> Iterator[Engine]:
    engine = make_engine(model, LIMITS)
    yield engine
    engine.close()


@pytest_asyncio.fixture
async def http(engine) -> AsyncIterator[httpx.AsyncClient]:
    async with client(engine) as http:
        yield http


@asynccontextmanager
async def client(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    card = ModelCard(name="tiny", root="tiny", max_context=CONTEXT, vocab_size=VOCAB, created=0)
    app = create_app(EngineBackend(engine), card, CODEC, Limits())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway", timeout=60) as http:
        yield http


def ids_of(text: str) -> list[int]:
    return list(CODEC.encode(text, add_special_tokens=False))


async def test_a_greedy_completion_is_what_the_model_generates(http, model):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "return_token_ids": True, "ignore_eos": True}
    choice = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    prompt = torch.tensor([ids_of(PROMPT)])
    with torch.no_grad():
        generated = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = generated[0, prompt.shape[1] :].tolist()
    assert choice["token_ids"] == expected
    full = CODEC.decode(ids_of(PROMPT) + expected, skip_special_tokens=True)
    assert PROMPT + choice["text"] == full


async def test_echoed_logprobs_are_the_models_own(http, model):
    texts = ["The gate picks experts", "and the router sends rows to hosts"]
    body = {"prompt": [ids_of(text) for text in texts], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    choices = (await http.post("/v1/completions", json=body)).json()["choices"]
    for text, choice in zip(texts, choices, strict=True):
        prompt = torch.tensor([ids_of(text)])
        with torch.no_grad():
            logprobs_TV = model(prompt).logits[0].float().log_softmax(-1)
        expected = logprobs_TV[:-1].gather(1, prompt[0, 1:, None])[:, 0]
        values = choice["logprobs"]["token_logprobs"][1:-1]
        torch.testing.assert_close(torch.tensor(values), expected, rtol=0, atol=2e-4)
        tops = choice["logprobs"]["top_logprobs"][1:-1]
        greedy = [value == max(top.values()) for value, top in zip(values, tops, strict=True)]
        assert greedy == (logprobs_TV[:-1].argmax(-1) == prompt[0, 1:]).tolist()


async def test_a_seed_fixes_every_choice_streamed_or_whole_alone_or_in_company(http):
    body = {"prompt": PROMPT, "seed": 11, "n": 3, "max_tokens": 10, "ignore_eos": True, "return_token_ids": True}
    whole = (await http.post("/v1/completions", json=body)).json()["choices"]
    said: dict[int, list[int]] = {0: [], 1: [], 2: []}
    text = (await http.post("/v1/completions", json={**body, "stream": True})).text
    for chunk in text.split("\n\n")[:-2]:
        choice = json.loads(chunk.removeprefix("data: "))["choices"][0]
        said[choice["index"]] += choice["token_ids"]
    assert [choice["token_ids"] for choice in whole] == list(said.values())
    assert len({tuple(ids) for ids in said.values()}) == 3
    alone = (await http.post("/v1/completions", json={**body, "n": 1, "seed": 12})).json()["choices"][0]
    assert alone["token_ids"] == said[1]


async def test_more_than_the_queue_can_hold_is_told_to_retry(http):
    body = {"prompt": [5], "n": 128, "max_tokens": 80, "ignore_eos": True}
    response = await http.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
    assert int(response.headers["retry-after"]) >= 1
    assert (await http.post("/v1/completions", json={"prompt": [5], "max_tokens": 1})).status_code == 200


async def test_an_encoder_decoder_answers_what_its_decoder_writes():
    model = build_model(
        Architecture(experts_class="", model_type="switch_transformers", auto_class=None), vocab_size=VOCAB
    )
    engine = make_engine(model, LIMITS)
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "return_token_ids": True, "ignore_eos": True}
    try:
        async with client(engine) as http:
            choice = (await http.post("/v1/completions", json=body)).json()["choices"][0]
            scored = await http.post("/v1/completions", json={**body, "echo": True, "logprobs": 1})
    finally:
        engine.close()
    prompt = torch.tensor([ids_of(PROMPT)])
    with torch.no_grad():
        generated = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert choice["token_ids"] == generated[0, 1:].tolist()
    assert choice["text"] == CODEC.decode(generated[0, 1:].tolist(), skip_special_tokens=True)
    assert (scored.status_code, scored.json()["error"]["param"]) == (400, "echo")
