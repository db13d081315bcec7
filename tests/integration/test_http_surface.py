"""The HTTP surface on a real server and socket, read by OpenAI's own client and, byte for byte, by a plain one."""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import random
import socket
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest

from expertmesh.engine.api import GenerateRequest, TokenEvent
from expertmesh.errors import NoReadyReplicaError
from expertmesh.ids import ExpertId
from expertmesh.serve.backend import Backend, Limits, ModelCard
from expertmesh.serve.openai_api import create_app
from expertmesh.serve.text import TextCodec
from expertmesh.testing.http_server import listening
from expertmesh.testing.scripted import ScriptedBackend, Step, scripted_logprob
from expertmesh.testing.tokenizers import byte_level_tokenizer

VOCAB, EOS, CONTEXT = 420, 1, 128
CODEC = TextCodec(byte_level_tokenizer())
CARD = ModelCard(
    name="tiny", root="/models/tiny", max_context=CONTEXT, vocab_size=VOCAB, created=7, eos_token_ids=(EOS,)
)
SAYING = "The gate picks 😀 experts, and stops. No more."
HUNG = "a prompt that the mesh never finishes"
BROKEN = "a prompt whose expert dies"


def ids_of(text: str) -> tuple[int, ...]:
    return CODEC.encode(text, add_special_tokens=False)


def script(request: GenerateRequest) -> Iterable[Step]:
    prompt = CODEC.decode(request.prompt_ids, skip_special_tokens=True)
    if HUNG in prompt:
        return ids_of("The gate")
    if BROKEN in prompt:
        return [*ids_of("The gate"), NoReadyReplicaError(ExpertId(0, 3))]
    if request.prompt_ids[0] == 300:
        return [ids_of("The gate"), ids_of(" picks"), EOS]
    return [*ids_of(SAYING), EOS]


@contextmanager
def serving(backend: Backend, codec: TextCodec | None = CODEC) -> Iterator[str]:
    app = create_app(backend, CARD, codec, Limits(), rng=random.Random(0))
    with listening(app, log_level="error") as url:
        yield url


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend(script, vocab_size=VOCAB, eos_token_ids=(EOS,))


@pytest.fixture(scope="module")
def url(backend) -> Iterator[str]:
    with serving(backend) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(url) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=10) as http:
        yield http


def events(response: httpx.Response) -> list[dict]:
    """The chunks of a stream, whose framing must be exact."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(line.startswith("data: {") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def say(role_text: str) -> list[dict]:
    return [{"role": "user", "content": role_text}]


def test_a_chat_is_the_same_whole_and_streamed(client):
    whole = client.chat.completions.create(model="tiny", messages=say("Hi"))
    assert whole.choices[0].message.content == SAYING
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.id.startswith("chatcmpl-")
    num_tokens = len(ids_of(SAYING)) + 1
    prompt_tokens = len(ids_of("<|user|>Hi</s><|assistant|>"))
    assert whole.usage.completion_tokens == num_tokens
    assert (whole.usage.prompt_tokens, whole.usage.total_tokens) == (prompt_tokens, prompt_tokens + num_tokens)

    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(
        model="tiny", messages=say("Hi"), stream=True, stream_options=options
    )
    assert {chunk.id for chunk in [*chunks, last]} == {last.id}
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    pieces = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(pieces) == SAYING
    assert "\ufffd" not in "".join(pieces)
    assert len(chunks) == num_tokens + 1, "one chunk for the role and one for each token"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * num_tokens + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage) == ([], whole.usage)


def test_a_completion_is_the_same_whole_and_streamed(client):
    whole = client.completions.create(model="tiny", prompt="Hi", max_tokens=5)
    chunks = list(client.completions.create(model="tiny", prompt="Hi", max_tokens=5, stream=True))
    expected = CODEC.decode(ids_of(SAYING)[:5], skip_special_tokens=True)
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert (whole.object, chunks[0].object) == ("text_completion", "text_completion")


def test_limits_left_out_are_sixteen_for_text_and_the_rest_of_the_context_for_chat(client, backend):
    client.completions.create(model="tiny", prompt="Hi")
    assert backend.requests[-1].sampling.max_tokens == 16
    client.chat.completions.create(model="tiny", messages=say("Hi"))
    assert backend.requests[-1].sampling.max_tokens == CONTEXT - len(backend.requests[-1].prompt_ids)


@pytest.mark.parametrize("stop", [" experts, and", ["never", "perts, a"], [".", "stops"]])
def test_a_stop_string_that_tokens_share_ends_the_text_before_it(client, stop):
    first = min((SAYING.find(text), text) for text in ([stop] if isinstance(stop, str) else stop) if text in SAYING)
    whole = client.completions.create(model="tiny", prompt="Hi", max_tokens=60, stop=stop)
    chunks = list(client.completions.create(model="tiny", prompt="Hi", max_tokens=60, stop=stop, stream=True))
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) == SAYING[: first[0]]
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    assert whole.choices[0].stop_reason == first[1]


def test_tokens_that_arrive_together_share_a_chunk(http):
    response = http.post("/v1/completions", json={"prompt": [300], "stream": True})
    assert [chunk["choices"][0]["text"] for chunk in events(response)] == ["The gate", " picks", ""]


def test_choices_have_their_own_seeds_and_places(client, backend):
    del backend.requests[:]
    seeds = {"seed": 40, "temperature": 0.5, "n": 2}
    answer = client.completions.create(model="tiny", prompt=["Hi", "Ho"], max_tokens=1, **seeds)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    asked = sorted(backend.requests, key=lambda request: request.request_id)
    assert [(request.prompt_ids, request.sampling.seed) for request in asked] == [
        (ids_of("Hi"), 40), (ids_of("Hi"), 41), (ids_of("Ho"), 40), (ids_of("Ho"), 41),
    ]  # fmt: skip
    assert answer.usage.prompt_tokens == len(ids_of("Hi")) + len(ids_of("Ho"))
    assert answer.usage.completion_tokens == 4
    chunks = list(client.chat.completions.create(model="tiny", messages=say("Hi"), n=2, stream=True))
    for index in (0, 1):
        mine = [chunk.choices[0].delta for chunk in chunks if chunk.choices[0].index == index]
        assert mine[0].role == "assistant"
        assert "".join(delta.content for delta in mine) == SAYING


def test_without_a_seed_no_two_choices_share_their_noise(http, backend):
    del backend.requests[:]
    http.post("/v1/completions", json={"prompt": ["Hi", "Hi"], "n": 2, "max_tokens": 1})
    assert len({request.sampling.seed for request in backend.requests}) == 4


def test_sampling_reaches_the_token_plane_as_sent(http, backend):
    sent = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "presence_penalty": 1.0,
        "frequency_penalty": -1.0, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True, "max_tokens": 4,
    }  # fmt: skip
    http.post("/v1/completions", json={"prompt": "Hi", "logit_bias": {"5": -100}, "stop_token_ids": [9], **sent})
    got = backend.requests[-1].sampling
    assert {name: getattr(got, name) for name in sent} == sent
    assert (dict(got.logit_bias), got.stop_token_ids, got.top_logprobs) == ({5: -100}, (9,), None)
    http.post("/v1/completions", json={"prompt": "Hi", "top_k": -1})
    assert backend.requests[-1].sampling.top_k == 0


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echoed_logprobs_read_as_evaluation_harnesses_read_them(http, max_tokens):
    prompts = [[10, 10, 11, 300], [12, 12]]
    body = {"prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1}
    choices = sorted(http.post("/v1/completions", json=body).json()["choices"], key=lambda choice: choice["index"])
    for ids, choice in zip(prompts, choices, strict=True):
        logprobs = choice["logprobs"]
        values, tops = logprobs["token_logprobs"], logprobs["top_logprobs"]
        assert {len(column) for column in logprobs.values()} == {len(ids) + max_tokens}
        assert values[0] is tops[0] is None
        pairs = list(itertools.pairwise(ids))
        assert values[1 : len(ids)] == [scripted_logprob(before, token, VOCAB) for before, token in pairs]
        greedy = [value == max(top.values()) for value, top in zip(values[1:], tops[1:], strict=True)]
        assert greedy[: len(pairs)] == [before == token for before, token in pairs]
        assert choice["text"].startswith(CODEC.decode(ids, skip_special_tokens=True))
        assert choice["finish_reason"] == "length"


def test_of_tokens_that_share_a_text_the_likeliest_stands_for_them(http):
    first, second, *_ = [token_id for token_id in ids_of("😀") if CODEC.token_text(token_id) == "\ufffd"]
    body = {"prompt": [first, second], "max_tokens": 0, "logprobs": 1, "echo": True}
    logprobs = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][1] == scripted_logprob(first, second, VOCAB)
    assert logprobs["top_logprobs"][1] == {"\ufffd": scripted_logprob(first, first, VOCAB)}


def test_an_echo_is_streamed_before_the_text(http):
    body = {"prompt": "Hi", "max_tokens": 2, "logprobs": 0, "echo": True, "stream": True}
    chunks = [chunk["choices"][0] for chunk in events(http.post("/v1/completions", json=body))]
    assert [chunk["text"] for chunk in chunks] == ["Hi", "The", " gate"]
    offsets = [offset for chunk in chunks for offset in chunk["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 2, 5]


def test_chat_logprobs_have_the_clients_shape(client):
    answer = client.chat.completions.create(
        model="tiny", messages=say("Hi"), logprobs=True, top_logprobs=3, max_completion_tokens=8
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 8
    assert b"".join(bytes(entry.bytes) for entry in entries) == SAYING.encode()[: len("The gate picks 😀".encode())]
    for entry in entries:
        ranked = [top.logprob for top in entry.top_logprobs]
        assert len(ranked) == 3
        assert ranked == sorted(ranked, reverse=True)
    bare = client.chat.completions.create(model="tiny", messages=say("Hi"), logprobs=True, max_tokens=2)
    assert [entry.top_logprobs for entry in bare.choices[0].logprobs.content] == [[], []]


def test_token_ids_come_back_on_request_whole_and_streamed(http):
    body = {"prompt": "Hi", "max_tokens": 3, "return_token_ids": True}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (list(ids_of("Hi")), list(ids_of(SAYING)[:3]))
    chunks = events(http.post("/v1/completions", json={**body, "stream": True}))
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[token_id] for token_id in ids_of(SAYING)[:3]]
    assert [("prompt_token_ids" in chunk["choices"][0]) for chunk in chunks] == [True, False, False]
    chat = {"messages": say("Hi"), "max_tokens": 3, "return_token_ids": True}
    answer = http.post("/v1/chat/completions", json=chat).json()
    assert answer["prompt_token_ids"] == list(ids_of("<|user|>Hi</s><|assistant|>"))
    assert answer["choices"][0]["token_ids"] == list(ids_of(SAYING)[:3])


def test_usage_can_come_with_every_chunk(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": say("Hi"), "max_tokens": 3, "stream": True, "stream_options": options}
    counts = [chunk["usage"]["completion_tokens"] for chunk in events(http.post("/v1/chat/completions", json=body))]
    assert counts == [0, 1, 2, 3, 3]


def test_a_failure_after_the_first_token_ends_the_stream_with_an_error(client, http):
    with pytest.raises(openai.APIError, match="expert 0:3"):
        list(client.completions.create(model="tiny", prompt=BROKEN, stream=True))
    *said, failure = events(http.post("/v1/completions", json={"prompt": BROKEN, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in said) == "The gate"
    assert failure["error"]["code"] == "no_ready_replica"


def take(ids: queue.SimpleQueue[str], wanted: set[str]) -> None:
    """Wait until each wanted id has come (a stop string cancels the rest of its choice, so others come, too)."""
    missing = set(wanted)
    while missing:
        missing.discard(ids.get(timeout=10))


@pytest.mark.parametrize("num_choices", [1, 3])
def test_a_client_that_leaves_a_stream_cancels_its_choices(http, backend, num_choices):
    body = {"prompt": HUNG, "max_tokens": 50, "stream": True, "n": num_choices}
    speaking = set()
    with http.stream("POST", "/v1/completions", json=body) as response:
        for line in filter(None, response.iter_lines()):
            chunk = json.loads(line.removeprefix("data: "))
            speaking.add(f"{chunk['id']}-{chunk['choices'][0]['index']}")
            if len(speaking) == num_choices:
                break
    take(backend.cancelled, speaking)


def test_a_client_that_leaves_while_it_waits_cancels_its_choices(url, backend):
    while not backend.started.empty():
        backend.started.get()
    body = json.dumps({"prompt": [HUNG] * 2, "max_tokens": 50})
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        running = {backend.started.get(timeout=10) for _ in range(2)}
    take(backend.cancelled, running)


def test_choices_run_side_by_side():
    class AllTogether:
        """Says nothing to anyone until six have asked."""

        def __init__(self) -> None:
            self.six = asyncio.Barrier(6)

        async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenEvent], None]:
            await self.six.wait()
            yield [TokenEvent(request_id=request.request_id, token_id=300, finish_reason="length")]

    with serving(AllTogether()) as url:
        body = {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 1}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=10).json()
    assert len(answer["choices"]) == 6


def test_without_a_tokenizer_ids_go_in_and_come_out(backend):
    with serving(backend, codec=None) as url, httpx.Client(base_url=url) as http:
        answer = http.post("/v1/completions", json={"prompt": [5, 5], "max_tokens": 2, "logprobs": 1}).json()
        choice = answer["choices"][0]
        assert (choice["text"], choice["token_ids"]) == ("", list(ids_of(SAYING)[:2]))
        assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in ids_of(SAYING)[:2]]
        assert http.get("/tokenizer_info").status_code == 404


def test_the_model_is_listed_as_load_generators_expect(client, http):
    card = client.models.list().data[0]
    assert (card.id, card.root, card.max_model_len, card.created) == ("tiny", "/models/tiny", CONTEXT, 7)
    assert client.models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_metrics_count_tokens_choices_and_requests():
    backend = ScriptedBackend(script, vocab_size=VOCAB, eos_token_ids=(EOS,))
    with serving(backend) as url, httpx.Client(base_url=url) as http:
        http.post("/v1/completions", json={"prompt": [5, 5, 5], "max_tokens": 4, "n": 2})
        assert 'http_requests_total{route="/v1/completions",status="200"} 1.0' in http.get("/metrics").text
        with http.stream("POST", "/v1/completions", json={"prompt": HUNG, "stream": True}) as response:
            next(response.iter_lines())
        backend.cancelled.get(timeout=5)
        text = http.get("/metrics").text
    prompt_tokens = 3.0 + len(ids_of(HUNG))
    for line in (
        f"expertmesh_prompt_tokens_total {prompt_tokens}",
        f"vllm:prompt_tokens_total {prompt_tokens}",
        'expertmesh_choices_total{finish_reason="length"} 2.0',
        'expertmesh_choices_total{finish_reason="abort"} 1.0',
        "expertmesh_time_to_first_token_seconds_count 3.0",
        "vllm:inter_token_latency_seconds_count",
        "expertmesh_num_requests_running 0.0",
    ):
        assert line in text
