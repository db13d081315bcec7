"""Everything that a client can get wrong, or that can go wrong behind it: status, envelope and the field's name."""

from __future__ import annotations

import httpx
import pytest

from expertmesh.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NoReadyReplicaError,
    NoRouterError,
    NotFiniteError,
    OverloadedError,
    ReplicaFailedError,
    RouterGoneError,
)
from expertmesh.ids import ExpertId, HostId
from expertmesh.serve.backend import Limits, ModelCard
from expertmesh.serve.openai_api import create_app
from expertmesh.serve.text import TextCodec
from expertmesh.testing.scripted import ScriptedBackend, Step
from expertmesh.testing.tokenizers import byte_level_tokenizer

pytestmark = pytest.mark.asyncio

CARD = ModelCard(name="tiny", root="tiny", max_context=64, vocab_size=420, created=7, eos_token_ids=(1,))
CODEC = TextCodec(byte_level_tokenizer())
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = {"prompt": "Hi", "max_tokens": 2}
TALK = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
JSON = {"content-type": "application/json"}


def client(*steps: Step, codec: TextCodec | None = CODEC, limits: Limits | None = None) -> httpx.AsyncClient:
    backend = ScriptedBackend(lambda request: steps or (300, 1), vocab_size=420, eos_token_ids=(1,))
    app = create_app(backend, CARD, codec, limits or Limits(max_body_bytes=50_000, max_choices=8))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


def error_of(response: httpx.Response) -> dict:
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"]
    return error


HUGE = 10**30
BAD_SAMPLING = [
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", HUGE), ("temperature", True),
    ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", HUGE), ("top_k", 1.5), ("min_p", -1), ("min_p", 2),
    ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0), ("repetition_penalty", 1e9),
    ("seed", HUGE), ("seed", "x"), ("n", 0), ("n", 129), ("n", 9), ("max_tokens", -1), ("max_tokens", 63),
    ("max_tokens", HUGE), ("max_tokens", 0), ("max_tokens", 2.5), ("min_tokens", -1), ("min_tokens", 3),
    ("max_completion_tokens", 3), ("stop", [""]), ("stop", ["x"] * 17), ("stop", 5), ("stop_token_ids", [420]),
    ("stop_token_ids", [-1]), ("stop_token_ids", ["x"]), ("logit_bias", {"420": 1}), ("logit_bias", {"x": 1}),
    ("logit_bias", {"5": 101}), ("stream", "yes"), ("stream_options", {"include_usage": True}),
    ("response_format", {"type": "json_object"}), ("best_of", 2), ("use_beam_search", True), ("prompt_logprobs", 1),
    ("guided_json", {}), ("truncate_prompt_tokens", 5),
]  # fmt: skip
BAD_COMPLETIONS = [
    ("prompt", ""), ("prompt", []), ("prompt", [[]]), ("prompt", ["a", ""]), ("prompt", 5), ("prompt", [1, "a"]),
    ("prompt", [True]), ("prompt", [420]), ("prompt", [[3, -1]]), ("prompt", [1.0]), ("prompt", {"a": 1}),
    ("prompt", list(range(65))), ("suffix", "end"), ("logprobs", 21), ("logprobs", -1), ("logprobs", True),
]  # fmt: skip
BAD_CHATS = [
    ("messages", []), ("messages", "Hi"), ("messages", [{"role": "user", "content": "word " * 80}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages", [{"role": "parrot", "content": "Hi"}]), ("tool_choice", "required"), ("echo", True),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}), ("top_logprobs", 2), ("top_logprobs", 21),
    ("logprobs", 2), ("modalities", ["audio"]), ("chat_template", "{{ 1 }}"),
    ("chat_template_kwargs", {"tokenize": True}), ("continue_final_message", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_SAMPLING, ids=lambda value: str(value)[:24])
@pytest.mark.parametrize(("route", "body"), [(COMPLETIONS, TEXT), (CHAT, TALK)], ids=["text", "chat"])
async def test_a_value_that_cannot_be_honoured_is_refused_by_name(route, body, field, value):
    response = await client().post(route, json={**body, field: value})
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"].split("[")[0].split(".")[0] == field


@pytest.mark.parametrize(("field", "value"), BAD_COMPLETIONS, ids=lambda value: str(value)[:24])
async def test_a_bad_completion_field_is_refused_by_name(field, value):
    response = await client().post(COMPLETIONS, json={**TEXT, field: value})
    assert (response.status_code, error_of(response)["param"]) == (400, field)


@pytest.mark.parametrize(("field", "value"), BAD_CHATS, ids=lambda value: str(value)[:24])
async def test_a_bad_chat_field_is_refused_by_name(field, value):
    response = await client().post(CHAT, json={**TALK, field: value})
    assert (response.status_code, error_of(response)["param"]) == (400, field)


@pytest.mark.parametrize("missing", [{"content": "Hi"}, {"role": 5, "content": "Hi"}])
async def test_a_field_inside_a_message_is_named_by_its_path(missing):
    response = await client().post(CHAT, json={"messages": [TALK["messages"][0], missing]})
    assert (response.status_code, error_of(response)["param"]) == (400, "messages[1].role")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
async def test_numbers_that_are_not_finite_are_refused(field, number):
    content = f'{{"prompt": "Hi", "{field}": {number}}}'
    response = await client().post(COMPLETIONS, content=content, headers=JSON)
    assert (response.status_code, error_of(response)["param"]) == (400, field)


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"3", b"null", b"\xff\xfe", b'{"prompt": "a"} x', b"[" * 40_000])
async def test_a_body_that_is_not_a_json_object_is_refused(content):
    response = await client().post(COMPLETIONS, content=content, headers=JSON)
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize("field", ["prompt", "model", "stop"])
async def test_half_a_surrogate_pair_is_refused(field):
    response = await client().post(COMPLETIONS, content=f'{{"prompt": "a", "{field}": "\\ud83d"}}', headers=JSON)
    assert response.status_code in (400, 404)
    error_of(response)


async def test_half_a_surrogate_pair_deep_in_a_message_is_refused():
    content = '{"messages": [{"role": "user", "content": "\\ud83d"}]}'
    response = await client().post(CHAT, content=content, headers=JSON)
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_only_json_is_read(content_type):
    response = await client().post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": content_type})
    assert response.status_code == 415
    error_of(response)


async def test_a_body_over_the_limit_is_refused_whether_or_not_it_says_so():
    async def chunks():
        for _ in range(60):
            yield b" " * 1000

    for content in (b" " * 50_001, chunks()):
        response = await client().post(COMPLETIONS, content=content, headers=JSON)
        assert response.status_code == 413
        assert "50000 bytes" in error_of(response)["message"]


@pytest.mark.parametrize(("route", "body"), [(COMPLETIONS, TEXT), (CHAT, TALK), ("/tokenize", {"prompt": "a"})])
async def test_an_unknown_model_is_not_found(route, body):
    response = await client().post(route, json={**body, "model": "gpt-5"})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("route", "body"), [(COMPLETIONS, {"prompt": [3] * 62, "max_tokens": 3}), (CHAT, {**TALK, "max_tokens": 64})]
)
async def test_a_context_that_cannot_hold_the_request_has_a_code_of_its_own(route, body):
    response = await client().post(route, json=body)
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("GET", COMPLETIONS, 405)])
async def test_the_frameworks_own_errors_wear_the_same_envelope(method, path, status):
    response = await client().request(method, path)
    assert response.status_code == status
    error_of(response)


@pytest.mark.parametrize(
    ("route", "body"),
    [(COMPLETIONS, TEXT), (CHAT, TALK), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]}),
     (COMPLETIONS, {"prompt": [5], "stop": "x"})],
)  # fmt: skip
async def test_without_a_tokenizer_the_client_is_told_to_send_token_ids(route, body):
    response = await client(codec=None).post(route, json=body)
    assert response.status_code == 400
    assert "token ids" in error_of(response)["message"]


async def test_chat_with_a_model_that_has_no_template_is_refused():
    codec = TextCodec(byte_level_tokenizer(chat_template=None))
    response = await client(codec=codec).post(CHAT, json=TALK)
    assert response.status_code == 400
    assert "chat template" in error_of(response)["message"]


FAILURES = [
    (OverloadedError("too many requests wait", retry_after_s=2.5), 429, "overloaded", "3"),
    (NoReadyReplicaError(ExpertId(0, 3)), 503, "no_ready_replica", "1"),
    (NoRouterError("no router took the request within 60 s"), 503, "no_router", "5"),
    (RouterGoneError("its process ended"), 503, "router_gone", "1"),
    (NotFiniteError("the model's logits are not finite"), 500, "not_finite", None),
    (DeadlineExceededError("the mesh took too long", deadline_s=5), 504, "deadline_exceeded", None),
    (InvalidRequestError("prompt too odd", param="prompt"), 400, None, None),
    (ReplicaFailedError(HostId("h1"), "shape"), 500, None, None),
    ("the engine lost its mind", 500, None, None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "status", "code", "retry_after"), FAILURES, ids=lambda value: str(value)[:20])
async def test_a_failure_before_the_first_token_has_its_own_status(failure, status, code, retry_after, stream):
    response = await client(failure).post(COMPLETIONS, json={**TEXT, "stream": stream})
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    error = error_of(response)
    assert error["code"] == code
    assert error["message"] == str(failure)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_that_nobody_foresaw_shows_nothing_of_itself(stream, caplog):
    response = await client(RuntimeError("secret")).post(COMPLETIONS, json={**TEXT, "stream": stream})
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "secret" not in response.text
    assert "secret" in caplog.text


async def test_a_failure_in_one_of_several_choices_ends_the_others():
    backend = ScriptedBackend(
        lambda request: [OverloadedError("full")] if request.prompt_ids == (9,) else [5], vocab_size=420
    )
    app = create_app(backend, CARD, CODEC, Limits())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        response = await http.post(COMPLETIONS, json={"prompt": [[8], [9]], "max_tokens": 4})
    assert response.status_code == 429
    assert backend.cancelled.get_nowait() == backend.requests[0].request_id
