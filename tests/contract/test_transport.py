"""Every transport keeps the same contract, over real hosts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
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
from expertmesh.transport.local import LocalTransport
from expertmesh.transport.network import NetworkTransport

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
        """Send all at once, wait for all; raises the first error."""
        with closing(self.make_transport()) as transport:
            return outcomes(transport, [transport.send(self.info, request) for request in requests])


def outcomes(transport: Transport, tickets: list[int]) -> list[LayerReply]:
    arrived: dict[int, object] = {}
    deadline = time.monotonic() + 20
    while len(arrived) < len(tickets) and time.monotonic() < deadline:
        arrived |= dict(transport.receive(1.0))
    replies = [arrived[ticket] for ticket in tickets]
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


NETWORKS = {
    "grpc": lambda token: NetworkTransport(token, local_sockets=False),
    "socket": NetworkTransport,
}


@pytest.fixture(params=["local", *NETWORKS])
def fixture(request: pytest.FixtureRequest) -> Iterator[Fixture]:
    host = MIXTURE.host(HELD)
    if request.param == "local":
        hosts = {HostId("h"): host}
        yield Fixture(lambda: LocalTransport(hosts), HostInfo(id=HostId("h"), address=""), host, hosts.clear)
        return
    server = HostServer(host, TOKEN)
    yield Fixture(lambda: NETWORKS[request.param](TOKEN), info_of(server, request.param), host, server.close)
    server.close()


def info_of(server: HostServer, network: str) -> HostInfo:
    """How to reach a server; over a socket, gRPC could not help."""
    return HostInfo(
        id=HostId("h"), address="127.0.0.1:9" if network == "socket" else server.address, socket=server.socket
    )


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


@pytest.mark.parametrize("network", NETWORKS)
def test_a_host_that_dies_fails_those_who_wait_and_is_found_again_when_it_is_back(network: str) -> None:
    host = MIXTURE.host(HELD)
    expected = host.compute([host.prepare(rows_for(0, [0]))])[0].rows.tobytes()
    server = HostServer(host, TOKEN)
    info = info_of(server, network)
    with closing(NETWORKS[network](TOKEN)) as transport:
        outcomes(transport, [transport.send(info, rows_for(0, [0]))])
        server.close()
        with pytest.raises(ReplicaUnavailableError):
            outcomes(transport, [transport.send(info, rows_for(0, [0]))])
        server = HostServer(host, TOKEN, port=int(server.address.rpartition(":")[2]))
        try:
            reply = outcomes(transport, [transport.send(info_of(server, network), rows_for(0, [0]))])[0]
            assert reply.rows.tobytes() == expected
        finally:
            server.close()


def test_a_socket_of_another_machine_leaves_grpc() -> None:
    server = HostServer(MIXTURE.host(HELD), TOKEN)
    elsewhere = HostInfo(id=HostId("h"), address=server.address, socket="expertmesh-not-here")
    try:
        assert Fixture(lambda: NetworkTransport(TOKEN), elsewhere, None, None).call(rows_for(0, [0]))  # type: ignore[arg-type]
    finally:
        server.close()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_wrong_token_is_refused(network: str) -> None:
    server = HostServer(MIXTURE.host(HELD), TOKEN)
    bad = Fixture(lambda: NETWORKS[network]("wrong"), info_of(server, network), None, None)  # type: ignore[arg-type]
    try:
        with pytest.raises(ReplicaUnavailableError, match="UNAUTHENTICATED: wrong or missing token"):
            bad.call(rows_for(0, [0]))
    finally:
        server.close()


def test_a_forgotten_answer_is_thrown_away_and_waking_ends_a_wait(fixture: Fixture) -> None:
    with closing(fixture.make_transport()) as transport:
        forgotten, kept = (transport.send(fixture.info, rows_for(0, [0])) for _ in range(2))
        transport.forget(forgotten)
        outcomes(transport, [kept])
        transport.wake()
        assert transport.receive(60.0) == []


@pytest.mark.parametrize("network", NETWORKS)
def test_large_messages_pass_whole(network: str) -> None:
    """Far above what a socket takes at once, in both directions."""
    server = HostServer(MIXTURE.host(HELD), TOKEN)
    request = rows_for(1, [2, 0], num_rows=40_000)
    host = MIXTURE.host(HELD)
    try:
        (reply,) = Fixture(lambda: NETWORKS[network](TOKEN), info_of(server, network), host, None).call(request)  # type: ignore[arg-type]
        assert reply.rows.tobytes() == host.compute([host.prepare(request)])[0].rows.tobytes()
    finally:
        server.close()
