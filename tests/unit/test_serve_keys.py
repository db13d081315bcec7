"""Who may use the model when the config names anyone; and what of a request is read before it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from expertmesh.config import ApiKey
from expertmesh.serve.backend import Limits, ModelCard
from expertmesh.serve.keys import OPEN_PATHS, draw_key, hash_of
from expertmesh.serve.openai_api import create_app
from expertmesh.testing.scripted import ScriptedBackend

pytestmark = pytest.mark.asyncio

CARD = ModelCard(name="tiny", root="tiny", max_context=64, vocab_size=420, created=7)
TOKEN = "s3cret-t0ken"
LIMITS = Limits()
ALICE, BOB = "em-alice-0123456789", "em-bob-0123456789"
KEYS = (ApiKey(name="alice", sha256=hash_of(ALICE)), ApiKey(name="bob", sha256=hash_of(BOB)))
COMPLETION = {"model": "tiny", "prompt": [1, 2], "max_tokens": 1}
GUARDED = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"),
    ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/mesh/trace?seconds=1"), ("GET", "/openapi.json"),
    ("GET", "/v1/nothing"), ("POST", "/mesh/rebalance"), ("GET", "/health/../v1/models"), ("GET", "//health"),
]  # fmt: skip


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(lambda request: [1], vocab_size=420)


def client(backend, limits: Limits = LIMITS, root_path: str = "", keys=KEYS) -> httpx.AsyncClient:
    app = create_app(backend, CARD, None, limits, token=TOKEN, keys=keys)
    transport = httpx.ASGITransport(app, root_path=root_path, client=("10.0.0.9", 5))
    return httpx.AsyncClient(transport=transport, base_url=f"http://gateway{root_path}")


@pytest_asyncio.fixture
async def http(backend) -> AsyncIterator[httpx.AsyncClient]:
    async with client(backend) as http:
        yield http


@pytest.mark.parametrize("given", [ALICE, BOB, TOKEN], ids=["a key", "another's key", "the shared token"])
async def test_a_key_opens_the_api(http, given):
    response = await http.post("/v1/completions", json=COMPLETION, headers={"authorization": f"Bearer {given}"})
    assert response.status_code == 200


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    "header",
    [
        None, "", "Bearer", "Bearer ", ALICE, f"Basic {ALICE}", f"Bearer {ALICE}x", f"Bearer  {ALICE}",
        f"Bearer {hash_of(ALICE)}", f"Bearer {ALICE[:-1]}", "Bearer \xe9\xff",
    ],
)  # fmt: skip
async def test_without_a_key_a_request_is_refused_in_openais_words(http, backend, method, path, header):
    headers = [] if header is None else [("authorization", header.encode("latin-1"))]
    response = await http.request(method, path, headers=headers)
    error = response.json()["error"]
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    assert (backend.orders, len(response.headers["x-request-id"])) == ([], 32)


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
@pytest.mark.parametrize("root_path", ["", "/mesh-a"])
async def test_what_monitors_read_stays_open(backend, path, root_path):
    async with client(backend, root_path=root_path) as http:
        assert (await http.get(path)).status_code in (200, 503)


async def test_under_a_prefix_the_rest_is_guarded_too(backend):
    async with client(backend, root_path="/mesh-a") as http:
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/v1/models", headers={"authorization": f"bearer {BOB}"})).status_code == 200


async def test_without_keys_in_the_config_nobody_needs_one(backend):
    async with client(backend, keys=()) as http:
        assert (await http.post("/v1/completions", json=COMPLETION)).status_code == 200


async def test_orders_still_need_the_shared_token(http, backend):
    response = await http.post("/mesh/rebalance", json={}, headers={"authorization": f"Bearer {ALICE}"})
    assert (response.status_code, backend.orders) == (401, [])


async def test_of_a_refused_request_no_body_is_read(backend):
    read = False

    async def body():
        nonlocal read
        read = True
        yield b"{}"

    app = create_app(backend, CARD, None, Limits(), token=TOKEN, keys=KEYS)
    sent = []

    async def receive():
        raise AssertionError("the body was asked for")

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    assert sent[0]["status"] == 401
    assert not read


async def test_a_wrong_key_is_logged_once_and_is_not_in_the_log(http, caplog):
    for _ in range(20):
        await http.get("/v1/models", headers={"authorization": "Bearer em-wrong"})
    (record,) = (record for record in caplog.records if record.name == "expertmesh.serve.keys")
    assert record.getMessage() == "refused 10.0.0.9: wrong or missing API key"
    assert (await http.get("/v1/models", headers={"authorization": f"Bearer {ALICE}"})).status_code == 200


async def test_a_config_holds_no_key_and_drawn_keys_differ():
    assert ALICE not in repr(KEYS)
    assert len({draw_key() for _ in range(100)}) == 100
    assert all(len(hash_of(draw_key())) == 64 for _ in range(10))


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "status"), [(900, 200), (1100, 431)])
async def test_headers_may_be_so_long(backend, size, status):
    async with client(backend, Limits(max_header_bytes=1000), keys=()) as http:
        http.headers.clear()
        response = await http.get("/v1/models", headers={"x": "y" * size})
        assert response.status_code == status


async def test_a_body_that_does_not_come_is_not_waited_for(backend):
    async def body():
        yield b'{"model":'
        await asyncio.Event().wait()

    async with client(backend, Limits(body_timeout_s=0.05), keys=()) as http:
        response = await http.post("/v1/completions", content=body(), headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["message"]) == (408, "the body took longer than 0.05 s")
