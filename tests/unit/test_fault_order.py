"""POST /mesh/fault: what may be asked, what reaches the mesh, and what a mesh that must not be broken says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from expertmesh.errors import ConfigError
from expertmesh.fault import NOT_ALLOWED
from expertmesh.serve.backend import Limits, ModelCard
from expertmesh.serve.openai_api import create_app
from expertmesh.testing.scripted import ScriptedBackend

pytestmark = pytest.mark.asyncio

CARD = ModelCard(name="tiny", root="tiny", max_context=64, vocab_size=420, created=7)
SLOW = {"kind": "slow", "share": 1.0, "factor": 10.0, "seconds": 5.0}
KILL = {"kind": "kill", "share": 1.0, "factor": 1.0, "seconds": 0.0}


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(lambda request: [1], vocab_size=420)


@pytest_asyncio.fixture
async def http(backend: ScriptedBackend) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(backend, CARD, None, Limits(), token="s3cret")
    headers = {"authorization": "Bearer s3cret"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mesh", headers=headers) as http:
        yield http


@pytest.mark.parametrize(
    ("sent", "asked"),
    [
        ({"target": "cpu-0", "faults": [SLOW], "seed": 7}, {"target": "cpu-0", "faults": [SLOW], "seed": 7}),
        ({"target": "cpu-0", "faults": []}, {"target": "cpu-0", "faults": [], "seed": 0}),
        ({"target": "router", "faults": [{"kind": "kill"}]}, {"target": "router", "faults": [KILL], "seed": 0}),
        ({"target": "controller", "faults": [{"kind": "kill"}]}, {"target": "controller", "faults": [KILL], "seed": 0}),
    ],
)
async def test_an_order_reaches_the_mesh(http, backend, sent: Any, asked: Any) -> None:
    response = await http.post("/mesh/fault", json=sent)
    assert response.status_code == 200
    assert backend.orders == [("fault", asked)]


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"faults": [KILL]}, "target"),
        ({"target": "cpu-0", "faults": [{"kind": "kil"}]}, "kind"),
        ({"target": "cpu-0", "faults": [{"kind": "corrupt", "share": 2}]}, "share"),
        ({"target": "cpu-0", "faults": [{"kind": "slow"}]}, "factor: 1.0 makes nothing slow"),
        ({"target": "cpu-0", "faults": [{"kind": "pause"}]}, "seconds: a pause needs some"),
        ({"target": "cpu-0", "faults": [KILL], "seed": -1}, "seed"),
        ({"target": "router", "faults": [SLOW]}, "of a router, kill is the only one"),
        ({"target": "controller", "faults": []}, "of a controller, kill is the only one"),
    ],
)
async def test_what_cannot_be_is_refused_before_it_reaches_the_mesh(http, backend, sent: Any, message: str) -> None:
    response = await http.post("/mesh/fault", json=sent)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert backend.orders == []


async def test_a_mesh_that_must_not_be_broken_says_what_to_do(http, backend) -> None:
    backend.refusal = ConfigError(NOT_ALLOWED)
    response = await http.post("/mesh/fault", json={"target": "cpu-0", "faults": [KILL]})
    assert (response.status_code, response.json()["error"]["message"]) == (400, NOT_ALLOWED)
    assert "say `faults: true` in its config" in NOT_ALLOWED


async def test_nobody_breaks_a_mesh_without_the_token(http, backend) -> None:
    body = {"target": "router", "faults": [KILL]}
    response = await http.post("/mesh/fault", json=body, headers={"authorization": "Bearer guess"})
    assert (response.status_code, backend.orders) == (401, [])
