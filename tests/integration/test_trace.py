"""Recording from, and replaying against, a mesh: real host processes, a real HTTP server, the command itself."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.control import views
from expertmesh.credentials import TOKEN_VARIABLE
from expertmesh.hosts.configuration import configuration_for
from expertmesh.hosts.process import HostProcess
from expertmesh.ids import ExpertId, HostId
from expertmesh.models import tiny_path
from expertmesh.placement import HostInfo, Placement
from expertmesh.testing.http_server import listening
from expertmesh.trace.format import TraceHeader, TraceReader, encode_choices, encode_header
from expertmesh.trace.recorder import TraceRecorder
from expertmesh.transport.grpc_control import GrpcHostControl

NUM_EXPERTS = (16,) * 4
MODELS = {"data": [{"id": "tiny", "root": "a folder that is not on this machine", "fingerprint": "f"}]}
HEADER = TraceHeader(model="tiny", fingerprint="f", num_experts=NUM_EXPERTS, top_k=2, content="choices")


@contextmanager
def serving(**routes: Callable[[Request], Response]) -> Iterator[str]:
    """A server of /mesh/trace, /mesh/placement and /v1/models, as far as they are given."""
    paths = {"trace": "/mesh/trace", "placement": "/mesh/placement", "models": "/v1/models"}
    app = Starlette(routes=[Route(paths[name], answer) for name, answer in routes.items()])
    with listening(app) as url:
        yield url


def exchanges(count: int) -> list[tuple[int, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(i % 4, np.stack([rng.permutation(16)[:2] for _ in range(1 + i % 5)])) for i in range(count)]


def test_what_a_mesh_records_is_in_the_file(trace_command, tmp_path: Path) -> None:
    async def stream(request: Request) -> Response:
        assert float(request.query_params["seconds"]) == 0.5
        recorder = TraceRecorder(HEADER, SYSTEM_CLOCK)

        async def pieces() -> AsyncIterator[bytes]:
            yield encode_header(HEADER)[:7]
            yield encode_header(HEADER)[7:]
            for layer, index_TK in exchanges(50):
                recorder.record(layer, index_TK)
                yield recorder.take()

        return StreamingResponse(pieces())

    path = tmp_path / "x.trace"
    with serving(trace=stream) as url:
        assert trace_command("record", "--address", url, "--seconds", 0.5, "-o", path)[0] == 0
    reader = TraceReader(path)
    assert reader.header == HEADER
    assert [(r.layer, r.index_TK.tolist()) for r in reader] == [(layer, i.tolist()) for layer, i in exchanges(50)]


def test_a_recording_that_breaks_off_keeps_what_came(trace_command, tmp_path: Path) -> None:
    async def stream(_: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield encode_header(HEADER)
            yield encode_choices(HEADER, 0, 0, np.array([[1, 2]]))
            await asyncio.sleep(0)
            raise ConnectionResetError

        return StreamingResponse(pieces())

    path = tmp_path / "x.trace"
    with serving(trace=stream) as url:
        code, _, err = trace_command("record", "--address", url, "-o", path)
    assert code == 2
    assert "broke off" in err
    assert len(list(TraceReader(path))) == 1


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"<html>", 200, "not an expertmesh trace"),
        (b"", 200, "it is empty"),
        (b"", 404, "answers 404"),
        (b"", 503, "answers 503"),
    ],
)
def test_what_is_no_recording_leaves_no_file(
    trace_command, tmp_path: Path, body: bytes, status: int, message: str
) -> None:
    path = tmp_path / "x.trace"
    with serving(trace=lambda _: Response(body, status)) as url:
        code, _, err = trace_command("record", "--address", url, "-o", path)
    assert code == 2
    assert message in err
    assert not path.exists()


def test_where_no_mesh_is_is_said_in_one_line(trace_command, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    code, _, err = trace_command("record", "--address", url, "-o", tmp_path / "x.trace")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert url in err


@pytest.fixture(scope="module")
def mesh() -> Iterator[str]:
    """The tiny model's experts on two host processes, layers 0 and 1 on the first: its URL."""
    index, token = index_checkpoint(tiny_path()), secrets.token_urlsafe()
    with HostProcess(token) as first, HostProcess(token) as second:
        hosts = first.info(HostId("first")), second.info(HostId("second"))
        replicas = {
            ExpertId(layer, e): (hosts[layer // 2].id,) for layer, count in enumerate(NUM_EXPERTS) for e in range(count)
        }
        placement = Placement(epoch=1, hosts=hosts, num_experts=NUM_EXPERTS, replicas=replicas)

        async def fill(host: HostInfo) -> None:
            control = GrpcHostControl(host, token)
            await control.configure(configuration_for(index, "tiny"))
            for expert, holders in replicas.items():
                if host.id in holders:
                    await control.load(expert, index.recipes[expert])
            await control.close()

        for host in hosts:
            asyncio.run(fill(host))
        told = views.placement(placement, configuration_for(index, "tiny"))
        with (
            pytest.MonkeyPatch.context() as patch,
            serving(placement=lambda _: JSONResponse(told), models=lambda _: JSONResponse(MODELS)) as url,
        ):
            patch.setenv(TOKEN_VARIABLE, token)
            yield url


def trace_file(tmp_path: Path, header: TraceHeader = HEADER, count: int = 40) -> Path:
    path = tmp_path / "x.trace"
    records = [encode_choices(header, 0.01 * i, layer, chosen) for i, (layer, chosen) in enumerate(exchanges(count))]
    path.write_bytes(encode_header(header) + b"".join(records))
    return path


def test_a_replay_sends_every_choice_to_the_host_that_holds_it(trace_command, mesh, tmp_path: Path) -> None:
    code, out, _ = trace_command("replay", trace_file(tmp_path), "--address", mesh, "--speed", 2, "--json")
    result = json.loads(out)
    assert code == 0
    rows = [sum(index_TK.size for layer, index_TK in exchanges(40) if layer // 2 == host) for host in (0, 1)]
    assert result["rows"] == {"first": rows[0], "second": rows[1]}
    assert (result["exchanges"], result["failures"]) == (40, {})
    assert 0 < result["latency_s"]["p50"] <= result["latency_s"]["p99"] <= result["latency_s"]["max"]
    assert result["wall_s"] >= 39 * 0.01 / 2


def test_a_trace_of_rows_is_replayed_by_drawing_choices(trace_command, mesh, tmp_path: Path) -> None:
    path = tmp_path / "made.trace"
    shape = ("--layers", 4, "--experts", 16, "--top-k", 2, "--windows", 3)
    assert trace_command("make", "topics", "-o", path, *shape)[0] == 0
    code, out, _ = trace_command("replay", path, "--address", mesh, "--speed", "inf", "--tokens", 20, "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["exchanges"], result["tokens"], sum(result["rows"].values())) == (12, 240, 480)


def test_rows_of_the_wrong_shape_fail_and_are_counted(trace_command, mesh, tmp_path: Path) -> None:
    path = trace_file(tmp_path, count=3)
    told = httpx.get(f"{mesh}/mesh/placement").json() | {"hidden": 8, "dtype": "float32"}
    with serving(placement=lambda _: JSONResponse(told), models=lambda _: JSONResponse(MODELS)) as url:
        code, out, _ = trace_command("replay", path, "--address", url, "--speed", "inf")
    assert code == 1
    assert "failed: 3 with ReplicaFailedError" in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (TraceHeader(model="big", num_experts=(16,) * 5, top_k=2, content="choices"), "5 layers of 16 experts"),
        (
            TraceHeader(model="tiny", fingerprint="other", num_experts=NUM_EXPERTS, top_k=2, content="choices"),
            "fingerprint other",
        ),
    ],
)
def test_a_trace_of_another_model_is_refused(
    trace_command, mesh, tmp_path: Path, header: TraceHeader, message: str
) -> None:
    code, _, err = trace_command("replay", trace_file(tmp_path, header), "--address", mesh)
    assert code == 2
    assert message in err


def test_without_the_token_there_is_no_replay(trace_command, mesh, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = trace_command("replay", trace_file(tmp_path), "--address", mesh)
    assert code == 2
    assert TOKEN_VARIABLE in err


def test_a_trace_without_exchanges_is_nothing_to_replay(trace_command, mesh, tmp_path: Path) -> None:
    code, _, err = trace_command("replay", trace_file(tmp_path, count=0), "--address", mesh)
    assert code == 2
    assert "holds no exchanges" in err
