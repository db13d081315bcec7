"""What an operator may ask of the gateway: orders that need the shared token, views and metrics that need nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from expertmesh.errors import BusyError, ConfigError, NoControllerError
from expertmesh.serve.backend import Limits, ModelCard
from expertmesh.serve.openai_api import create_app
from expertmesh.testing.scripted import ScriptedBackend

pytestmark = pytest.mark.asyncio

CARD = ModelCard(name="tiny", root="tiny", max_context=64, vocab_size=420, created=7)
TOKEN = "s3cret-t0ken"
ORDERS = [
    ("scale", {"pool": "cpu", "hosts": 3}),
    ("auto", {"pool": "cpu"}),
    ("drain", {"host": "cpu-1"}),
    ("rebalance", {}),
]


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(lambda request: [1], vocab_size=420)


@pytest_asyncio.fixture
async def http(backend) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(backend, CARD, None, Limits(), token=TOKEN)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        http.headers["authorization"] = f"Bearer {TOKEN}"
        yield http


@pytest.mark.parametrize(("what", "values"), ORDERS)
async def test_an_order_reaches_the_backend(http, backend, what, values):
    response = await http.post(f"/mesh/{what}", json=values)
    assert (response.status_code, response.json()) == (200, {"accepted": True})
    assert backend.orders == [(what, values)]


@pytest.mark.parametrize(("what", "values"), ORDERS)
@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {TOKEN} ", f"Bearer {TOKEN}x", TOKEN, "Bearer s\xe9cret"],
)
async def test_without_the_token_no_order_reaches_the_backend(http, backend, what, values, header):
    del http.headers["authorization"]
    headers = [] if header is None else [("authorization", header.encode("latin-1"))]
    response = await http.post(f"/mesh/{what}", json=values, headers=headers)
    error = response.json()["error"]
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert TOKEN not in response.text
    assert backend.orders == []


async def test_a_gateway_without_a_token_takes_no_orders(backend):
    app = create_app(backend, CARD, None, Limits())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        for header in ("Bearer ", "Bearer None"):
            response = await http.post("/mesh/rebalance", json={}, headers={"authorization": header})
            assert response.status_code == 404
    assert backend.orders == []


@pytest.mark.parametrize(
    ("what", "values", "param"),
    [
        ("scale", {"pool": "cpu"}, "hosts"), ("scale", {"hosts": 3}, "pool"),
        ("scale", {"pool": "cpu", "hosts": -1}, "hosts"), ("scale", {"pool": "cpu", "hosts": "3"}, "hosts"),
        ("scale", {"pool": "cpu", "hosts": True}, "hosts"), ("scale", {"pool": "cpu", "hosts": 2.0}, "hosts"),
        ("scale", {"pool": "", "hosts": 1}, "pool"), ("scale", {"pool": 1, "hosts": 1}, "pool"),
        ("scale", {"pool": "cpu", "hosts": 10**30}, "hosts"), ("auto", {}, "pool"), ("auto", {"pool": ["cpu"]}, "pool"),
        ("drain", {}, "host"), ("drain", {"host": ""}, "host"), ("drain", {"host": None}, "host"),
    ],
)  # fmt: skip
async def test_a_bad_value_is_refused_by_name(http, backend, what, values, param):
    response = await http.post(f"/mesh/{what}", json=values)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert backend.orders == []


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (ConfigError("pool 'gpu': there is none; pools are cpu"), 400, None),
        (BusyError("pool cpu is just being scaled to 3 hosts"), 409, "busy"),
        (NoControllerError("the mesh is still starting"), 503, "no_controller"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_refusal_has_the_controllers_own_line(http, backend, refusal, status, code):
    backend.refusal = refusal
    response = await http.post("/mesh/scale", json={"pool": "gpu", "hosts": 3})
    error = response.json()["error"]
    assert (response.status_code, error["message"], error["code"]) == (status, str(refusal), code)
    assert ("retry-after" in response.headers) == (status == 503)


async def test_looking_needs_no_token(http, backend):
    del http.headers["authorization"]
    backend.views["moves"] = {"moves": [{"what": "loading 0:3 on cpu-1"}], "alarm": ""}
    assert (await http.get("/mesh/moves")).json() == backend.views["moves"]


async def test_a_view_that_no_controller_answers_is_unavailable(http):
    response = await http.get("/mesh/hosts")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_controller")


# --- metrics ---------------------------------------------------------------------------------------------------------

VIEWS = {
    "hosts": [
        {"id": "cpu-0", "pool": "cpu", "state": "ready", "busy": 0.75, "rows": 1200},
        {"id": "cpu-1", "pool": "cpu", "state": "ready", "busy": 0.5, "rows": 800},
        {"id": "cpu-2", "pool": "cpu", "state": "starting"},
    ],
    "routers": [
        {
            "id": "r1",
            "age_s": 0.4,
            "epoch": 7,
            "avoided": ["cpu-0", "cpu-1"],
            "running": 3,
            "waiting": 1,
            "requests": 960,
            "hedges": 12,
            "overtaken": 2,
            "sent_again": 5,
            "not_finite": 4,
            "double_checked": 6,
        },
        {
            "id": "r2",
            "age_s": 0.9,
            "epoch": 6,
            "avoided": [],
            "running": 0,
            "waiting": 0,
            "requests": 10,
            "hedges": 0,
            "overtaken": 0,
            "sent_again": 0,
            "not_finite": 0,
            "double_checked": 0,
        },
    ],
    "placement": {
        "epoch": 7,
        "num_experts": [2, 2],
        "hosts": [{"id": "cpu-0", "experts": [[0, 0], [0, 1], [1, 0]]}, {"id": "cpu-1", "experts": [[0, 0], [1, 1]]}],
    },
    "load": {"per_second": [[10.0, 2.5], [0.0, 4.0]], "imbalance": 1.25, "imbalance_of_layers": [1.5, 1.0]},
    "moves": {"moves": [{"what": "starting cpu-2"}], "alarm": ""},
}


async def scraped(http) -> dict[str, float]:
    """Every sample of ours by its name and labels, as they are written."""
    response = await http.get("/metrics")
    assert response.status_code == 200
    lines = (line.removeprefix("expertmesh_").rpartition(" ") for line in response.text.splitlines())
    return {name: float(value) for name, _, value in lines if not name.startswith("#")}


async def test_metrics_show_the_mesh(http, backend):
    backend.views.update(VIEWS)
    shown = await scraped(http)
    expected = {
        "controller_up": 1, "placement_epoch": 7, "replicas": 5, "imbalance": 1.25, "moves": 1, "alarm": 0,
        'hosts{pool="cpu",state="ready"}': 2, 'hosts{pool="cpu",state="starting"}': 1,
        'host_busy{host="cpu-0"}': 0.75, 'host_busy{host="cpu-1"}': 0.5,
        'host_rows_total{host="cpu-0"}': 1200, 'host_rows_total{host="cpu-1"}': 800,
        'expert_load{expert="0",layer="0"}': 10, 'expert_load{expert="1",layer="0"}': 2.5,
        'expert_load{expert="0",layer="1"}': 0, 'expert_load{expert="1",layer="1"}': 4,
        'exchange_requests_total{router="r1"}': 960, 'exchange_requests_total{router="r2"}': 10,
        'exchange_hedges_total{router="r1"}': 12, 'exchange_overtaken_total{router="r1"}': 2,
        'exchange_sent_again_total{router="r1"}': 5, 'exchange_not_finite_total{router="r1"}': 4,
        'exchange_double_checked_total{router="r1"}': 6, 'exchange_double_checked_total{router="r2"}': 0,
        'router_running{router="r1"}': 3, 'router_waiting{router="r1"}': 1, 'router_waiting{router="r2"}': 0,
        'router_avoided_hosts{router="r1"}': 2, 'router_avoided_hosts{router="r2"}': 0,
    }  # fmt: skip
    assert {key: shown.get(key) for key in expected} == expected


async def test_metrics_forget_what_has_gone(http, backend):
    backend.views.update(VIEWS)
    await scraped(http)
    backend.views["hosts"] = VIEWS["hosts"][:1]
    backend.views["routers"] = VIEWS["routers"][1:]
    backend.views["moves"] = {"moves": [], "alarm": "the control loop has not turned for 40 s"}
    backend.views["load"] = VIEWS["load"] | {"imbalance": None}
    shown = await scraped(http)
    assert [key for key in shown if "cpu-1" in key or "starting" in key or "r1" in key or key == "imbalance"] == []
    assert (shown["alarm"], shown["moves"]) == (1, 0)


async def test_metrics_are_there_without_a_controller(http):
    shown = await scraped(http)
    assert shown["controller_up"] == 0
    assert "placement_epoch" not in shown
    assert shown["http_requests_in_flight"] == 1


@pytest.mark.parametrize(("num_experts", "is_shown"), [(4096, True), (4097, False)])
async def test_a_model_with_very_many_experts_has_no_figure_for_each(http, backend, num_experts, is_shown):
    load = {"per_second": [[1.0] * num_experts], "imbalance": 1.0, "imbalance_of_layers": [1.0]}
    backend.views.update(VIEWS | {"load": load})
    shown = await scraped(http)
    assert any(key.startswith("expert_load{") for key in shown) is is_shown
    assert shown["imbalance"] == 1
