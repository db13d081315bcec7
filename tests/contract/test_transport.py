"""Every transport keeps the same contract, over real hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from expertmesh.errors import ReplicaUnavailableError
from expertmesh.hosts.host import Host
from expertmesh.hosts.process import HostServer
from expertmesh.ids import ExpertId, HostId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.placement import HostInfo
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.transport import LayerReply, LayerRequest, Transport
from expertmesh.transport.grpc_transport import GrpcTransport
from expertmesh.transport.local import LocalTransport

MIXTURE = Mixture(ExpertSpec(hidden=16, intermediate=24, activation=SILU), 2, 4)
HELD = [ExpertId(layer, index) for layer in range(2) for index in range(3)]
TOKEN = "right"


@dataclass
class Fixture:
    make_transport: Callable[[], Transport]
    info: HostInfo
    host: Host
    kill: Callable[[], None]

    def call(self, *requests: LayerRequest) -> list[LayerReply]:
        async def all_at_once() -> list[LayerReply]:
            transport = self.make_transport()
            try:
                return await asyncio.gather(*(transport.call(self.info, request) for request in requests))
            finally:
                await transport.close()

        return asyncio.run(all_at_once())


@pytest.fixture(params=["local", "grpc"])
def fixture(request: pytest.FixtureRequest) -> Iterator[Fixture]:
    host = MIXTURE.host(HELD)
    if request.param == "local":
        hosts = {HostId("h"): host}
        yield Fixture(lambda: LocalTransport(hosts), HostInfo(id=HostId("h"), address=""), host, hosts.clear)
        return
    server = HostServer(host, TOKEN)
    yield Fixture(lambda: GrpcTransport(TOKEN), HostInfo(id=HostId("h"), address=server.address), host, server.close)
    server.close()


def rows_for(layer: int, experts: list[int], *, seed: int = 0, num_rows: int = 5) -> LayerRequest:
    x = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(seed))
    pair_rows = np.tile(np.arange(num_rows, dtype=np.int32), len(experts))
    return LayerRequest(layer, "float32", x.view(torch.uint8).numpy(), pair_rows, experts, [num_rows] * len(experts))


def test_answers_what_the_host_computes(fixture: Fixture) -> None:
    request = rows_for(1, [2, 0])
    (reply,) = fixture.call(request)
    assert reply.rows.tobytes() == MIXTURE.host(HELD).compute([fixture.host.prepare(request)])[0].rows.tobytes()
    assert reply.rows.shape == (10, 64)


def test_requests_in_flight_together_get_each_its_own_answer(fixture: Fixture) -> None:
    requests = [rows_for(i % 2, [i % 3], seed=i, num_rows=1 + i) for i in range(12)]
    replies = fixture.call(*requests)
    for request, reply in zip(requests, replies, strict=True):
        expected = fixture.host.compute([fixture.host.prepare(request)])[0]
        assert reply.rows.tobytes() == expected.rows.tobytes()


def test_an_expert_that_is_not_held_is_unavailable(fixture: Fixture) -> None:
    with pytest.raises(ReplicaUnavailableError, match=r"0:3 is not held here") as caught:
        fixture.call(rows_for(0, [1, 3]))
    assert caught.value.host == "h"


def test_a_dead_host_is_unavailable(fixture: Fixture) -> None:
    fixture.kill()
    with pytest.raises(ReplicaUnavailableError):
        fixture.call(rows_for(0, [0]))


def test_a_host_that_dies_fails_those_who_wait_and_is_found_again_when_it_is_back() -> None:
    host = MIXTURE.host(HELD)
    server = HostServer(host, TOKEN)
    info = HostInfo(id=HostId("h"), address=server.address)

    async def story() -> bytes:
        nonlocal server
        transport = GrpcTransport(TOKEN)
        await transport.call(info, rows_for(0, [0]))
        await asyncio.to_thread(server.close)
        with pytest.raises(ReplicaUnavailableError):
            await transport.call(info, rows_for(0, [0]))
        server = HostServer(host, TOKEN, port=int(info.address.rpartition(":")[2]))
        reply = await transport.call(info, rows_for(0, [0]))
        await transport.close()
        return reply.rows.tobytes()

    try:
        assert asyncio.run(story()) == host.compute([host.prepare(rows_for(0, [0]))])[0].rows.tobytes()
    finally:
        server.close()


def test_a_wrong_token_is_refused() -> None:
    server = HostServer(MIXTURE.host(HELD), TOKEN)
    bad = Fixture(lambda: GrpcTransport("wrong"), HostInfo(id=HostId("h"), address=server.address), None, None)  # type: ignore[arg-type]
    try:
        with pytest.raises(ReplicaUnavailableError, match="UNAUTHENTICATED: wrong or missing token"):
            bad.call(rows_for(0, [0]))
    finally:
        server.close()
