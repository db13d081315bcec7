"""What can be asked without generating: health, the tokenizer, the mesh, and the id that every answer carries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import get_args

import httpx
import pytest
import pytest_asyncio

from expertmesh.serve.backend import Limits, MeshView, ModelCard
from expertmesh.serve.openai_api import create_app
from expertmesh.serve.text import TextCodec
from expertmesh.testing.scripted import ScriptedBackend
from expertmesh.testing.tokenizers import byte_level_tokenizer

pytestmark = pytest.mark.asyncio

CARD = ModelCard(name="tiny", root="tiny", max_context=64, vocab_size=420, created=7, eos_token_ids=(1,))
CODEC = TextCodec(byte_level_tokenizer())
MESH = {view: {"of": view} for view in get_args(MeshView)}


def ids_of(text: str) -> list[int]:
    return list(CODEC.encode(text, add_special_tokens=False))


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(lambda request: [1], vocab_size=420, mesh=MESH)


@pytest_asyncio.fixture
async def http(backend) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(backend, CARD, CODEC, Limits())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        yield http


async def test_the_request_id_is_the_clients_own_or_a_new_one(http):
    async def request_id(**headers: str) -> str:
        return (await http.get("/version", headers=headers)).headers["x-request-id"]

    assert await request_id(**{"x-request-id": "mine-7"}) == "mine-7"
    assert await request_id() != await request_id()
    assert len(await request_id(**{"x-request-id": "x" * 500})) == 32


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")])
async def test_health_follows_the_backend(http, backend, method, path):
    assert (await http.request(method, path)).status_code == 200
    backend.is_healthy = False
    response = await http.request(method, path)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


async def test_text_becomes_tokens_and_tokens_text(http):
    answer = (await http.post("/tokenize", json={"prompt": "The gate", "return_token_strs": True})).json()
    assert answer == {
        "count": 2, "max_model_len": 64, "tokens": ids_of("The gate"), "token_strs": ["The", " gate"],
    }  # fmt: skip
    answer = (await http.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert answer == {"prompt": "The gate"}


async def test_messages_are_tokenized_through_the_chat_template(http):
    answer = (await http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]})).json()
    assert answer["tokens"] == ids_of("<|user|>Hi</s><|assistant|>")


@pytest.mark.parametrize("body", [{}, {"prompt": 5}, {"messages": []}, {"prompt": "a", "add_special_tokens": 1}])
async def test_what_cannot_be_tokenized_is_refused(http, body):
    response = await http.post("/tokenize", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in ("prompt", "messages", "add_special_tokens")


async def test_token_ids_outside_of_the_vocabulary_have_no_text(http):
    response = await http.post("/detokenize", json={"tokens": [5, 420]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


async def test_a_client_can_learn_the_tokenizers_special_tokens_and_template(http):
    info = (await http.get("/tokenizer_info")).json()
    assert (info["bos_token"], info["eos_token"], info["model_max_length"]) == ("<s>", "</s>", 64)
    assert "messages" in info["chat_template"]


async def test_the_mesh_is_shown_as_the_backend_tells_it(http):
    assert {view: (await http.get(f"/mesh/{view}")).json() for view in MESH} == MESH


async def test_every_route_is_documented(http):
    paths = (await http.get("/openapi.json")).json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/mesh/load"} <= paths.keys()
