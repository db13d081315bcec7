"""Whatever a client sends, the gateway answers with a status that its API knows, and every error has OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import schemathesis
from hypothesis import example, given
from hypothesis import strategies as st

from expertmesh.serve.backend import Limits, ModelCard
from expertmesh.serve.openai_api import create_app
from expertmesh.serve.text import TextCodec
from expertmesh.testing.http_server import listening
from expertmesh.testing.scripted import ScriptedBackend
from expertmesh.testing.tokenizers import byte_level_tokenizer
from tests.fuzz.fuzzing import altered, damaged, fuzzed, texts

VOCAB, MAX_BODY, TOKEN = 420, 60_000, "token"
CARD = ModelCard(name="tiny", root="tiny", max_context=64, vocab_size=VOCAB, created=7, eos_token_ids=(1,))
JSON = {"content-type": "application/json"}
STATUSES = {200, 400, 401, 404, 405, 413, 415, 503}

COMPLETION: dict[str, Any] = {
    "model": "tiny", "prompt": ["Hi", [5, 6]], "max_tokens": 3, "min_tokens": 1, "temperature": 0.5, "top_p": 0.9,
    "top_k": 5, "min_p": 0.1, "seed": 3, "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.5,
    "logit_bias": {"5": 1.5}, "n": 2, "stop": ["x", "yz"], "stop_token_ids": [7], "stream": False, "echo": True,
    "logprobs": 2, "ignore_eos": False, "skip_special_tokens": True, "include_stop_str_in_output": True,
    "return_token_ids": True, "return_tokens_as_token_ids": True, "add_special_tokens": True, "best_of": 1, "user": "u",
}  # fmt: skip
FUNCTION = {"name": "f", "arguments": '{"a": [1]}'}
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Ho", "tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ],
    "max_completion_tokens": 3, "temperature": 1, "logprobs": True, "top_logprobs": 2, "tool_choice": "auto",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low", "n": 1,
    "stream": True, "stream_options": {"include_usage": True}, "response_format": {"type": "text"},
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/tokenize": {"prompt": "Hi there", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"tokens": [5, 6, 7], "model": "tiny"},
    "/mesh/scale": {"pool": "cpu", "hosts": 3},
    "/mesh/auto": {"pool": "cpu"},
    "/mesh/drain": {"host": "cpu-1"},
    "/mesh/rebalance": {},
}


def make_app() -> Any:
    backend = ScriptedBackend(lambda _: (300, 301, 1), vocab_size=VOCAB, eos_token_ids=(1,))
    limits = Limits(max_body_bytes=MAX_BODY, max_choices=8)
    return create_app(backend, CARD, TextCodec(byte_level_tokenizer()), limits, token=TOKEN)


APP = make_app()


@functools.cache
def runner() -> asyncio.Runner:
    """One event loop for all examples."""
    return asyncio.Runner()


def ask(method: str, path: str, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(APP)  # which lets out whatever the app does
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            async with asyncio.timeout(20):
                return await client.request(method, path, **options)

    return runner().run(once())


def check(response: httpx.Response) -> None:
    assert response.status_code in STATUSES, (response.status_code, response.text[:300])
    assert response.headers["x-request-id"]
    if response.status_code >= 400 and "error" in response.text:
        assert_error(response.json())
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        assert "server_error" not in response.text


def assert_error(body: Any) -> None:
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "\n" not in error["message"]
    assert error["type"] in ("invalid_request_error", "server_error", "rate_limit_error", "timeout_error")


@fuzzed(250)
@given(st.sampled_from(list(BODIES)).flatmap(lambda path: st.tuples(st.just(path), altered(BODIES[path]))))
def test_any_json_is_answered(asked) -> None:
    path, body = asked
    content = json.dumps(body).encode()  # with NaN, Infinity, and halves of surrogate pairs, as Python writes them
    check(ask("POST", path, content=content, headers=JSON | {"authorization": f"Bearer {TOKEN}"}))


@fuzzed(120)
@given(st.sampled_from(list(BODIES)).flatmap(lambda path: st.tuples(st.just(path), damaged(text_of(path)))))
def test_damaged_json_is_answered(asked) -> None:
    path, content = asked
    check(ask("POST", path, content=content, headers=JSON))


def text_of(path: str) -> bytes:
    return json.dumps(BODIES[path]).encode()


def nested(depth: int, field: str, *, opened: str = "[", closed: str = "]") -> bytes:
    return f'{{"prompt": "a", "{field}": {opened * depth}{closed * depth}}}'.encode()


BOMBS = {
    "lists": nested(20_000, "prompt"),
    "lists that are not closed": b"[" * MAX_BODY,
    "maps": nested(9_000, "x", opened='{"a":', closed="}")[:MAX_BODY],
    "lists in a field that is ignored": nested(500, "x"),
    "a long number": b'{"prompt": "a", "max_tokens": ' + b"9" * 50_000 + b"}",
    "a number that Python will not write": b'{"prompt": "a", "min_tokens": ' + b"9" * 4_299 + b"}",
    "a long fraction": b'{"prompt": "a", "temperature": 0.' + b"1" * 50_000 + b"}",
    "a great exponent": b'{"prompt": "a", "temperature": 1e999999999}',
    "NaN": b'{"prompt": "a", "logit_bias": {"5": NaN}}',
    "keys twice": b'{"prompt": "a", "prompt": 5, "prompt": [[]], "max_tokens": 1, "max_tokens": -1}',
    "many prompts": b'{"max_tokens": 1, "prompt": [' + b'"a",' * 14_000 + b'"a"]}',
    "many token ids": b'{"max_tokens": 1, "prompt": [' + b"5," * 25_000 + b"5]}",
    "many keys": b"{" + b",".join(b'"%d":1' % i for i in range(5_000)) + b"}",
    "many messages": b'{"messages": [' + b'{"role":"user"},' * 3_000 + b'{"role":"user"}]}',
    "nested messages": b'{"messages": [{"role": "user", "content": "a", "x": ' + b"[" * 400 + b"]" * 400 + b"}]}",
    "nested arguments": json.dumps(
        {"messages": [{"role": "user", "tool_calls": [{"function": {"arguments": "[" * 20_000}}]}]}
    ).encode(),
    "nested template variables": b'{"messages": [{"role": "user"}], "chat_template_kwargs": {"x": '
    + b"[" * 300 + b"]" * 300 + b"}}",
    "a surrogate as a key": b'{"prompt": "a", "logit_bias": {"\\ud83d": 5}}',
    "a line break as a key": b'{"prompt": "a", "logit_bias": {"5\\n6": "x"}}',
    "UTF-16": '{"prompt": "a", "max_tokens": 1}'.encode("utf-16"),
    "a broken UTF-16": '{"prompt": "a"}'.encode("utf-16")[:-1],
    "not UTF-8": b'{"prompt": "\xff\xfe\x80"}',
    "a zero byte": b'{"prompt": "\x00"}\x00',
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 1}',
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_little(path, bomb) -> None:
    started = time.process_time()
    check(ask("POST", path, content=BOMBS[bomb], headers=JSON))
    assert time.process_time() - started < 2


header_texts = st.text(st.characters(min_codepoint=32, max_codepoint=255, blacklist_characters="\x7f"), max_size=30)


@fuzzed(120)
@given(
    st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"]),
    st.sampled_from([*BODIES, "/v1/models", "/v1/models/tiny", "/health", "/ping", "/metrics", "/mesh/hosts", "/nope"])
    | texts.map(lambda text: f"/v1/models/{text}"),
    st.dictionaries(
        st.sampled_from(
            ["content-type", "content-length", "authorization", "x-request-id", "accept", "range", "expect"]
        ),
        header_texts | st.sampled_from(["9" * 5000, "-1", "application/json", "Bearer token", "gzip", "100-continue"]),
        max_size=4,
    ),
    st.binary(max_size=40),
)
@example("POST", "/v1/completions", {"content-length": "9" * 5000}, b"")
def test_any_method_path_and_headers_are_answered(method, path, headers, content) -> None:
    url = "http://gateway" + quote(path, errors="surrogatepass")
    given_headers = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    response = ask(method, url, content=content, headers=given_headers)
    assert response.status_code in STATUSES
    if response.status_code >= 400 and method != "HEAD" and response.status_code != 503:
        assert_error(response.json())


@fuzzed(40)
@given(st.floats() | st.integers() | texts)
@example(float("nan"))
@example(float("inf"))
def test_any_length_of_a_recording_is_answered(seconds) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        check(ask("GET", "/mesh/trace", params={"seconds": str(seconds)}))


# --- schemathesis reads the description that clients read ------------------------------------------------------------

schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@schema.parametrize()
@fuzzed(8)
def test_what_the_description_allows_and_forbids_is_answered(case) -> None:
    response = case.call(headers={"authorization": f"Bearer {TOKEN}"})
    assert response.status_code in STATUSES, response.text[:300]
    if response.status_code >= 400 and response.status_code != 503:
        assert_error(response.json())


# --- on a real server ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listening(APP) as url:
        yield int(url.rpartition(":")[2])


REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'1c\r\n{"prompt": "a", "max_tokens"\r\n5\r\n: 2} \r\n0\r\n\r\n'
)


@fuzzed(40)
@given(damaged(REQUEST) | st.integers(0, len(REQUEST)).map(lambda end: REQUEST[:end]))
def test_a_connection_of_any_bytes_disturbs_nobody(port, data) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            answer = b"".join(iter(lambda: peer.recv(65536), b""))
            assert b" 500 " not in answer.partition(b"\r\n")[0], answer
    response = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "a", "max_tokens": 2})
    assert response.json()["usage"]["completion_tokens"] == 2
