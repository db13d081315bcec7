"""What strangers may do to a host: little, for a short time, and with one line in the log. Others do not notice."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import HostStub
from expertmesh.hosts import local_socket, service
from expertmesh.hosts.process import HostServer
from expertmesh.ids import ExpertId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.transport.grpc_link import SERVER_OPTIONS, credentials
from tests.local_peer import connect, local_request, open_session, read

MIXTURE = Mixture(ExpertSpec(hidden=16, intermediate=24, activation=SILU), 1, 2)
LIMITS = {
    "grpc.server_handshake_timeout_ms": 300,
    "grpc.max_allowed_incoming_connections": 4,
    "grpc.max_receive_message_length": 2**20,
}


@pytest.fixture
def idle_ms() -> int:
    """Long where answers are judged: a connection that is closed as idle may take the last of them with it."""
    return 60_000


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, idle_ms: int) -> Iterator[HostServer]:
    """With the limits that it always has, made small."""
    limits = LIMITS | {"grpc.max_connection_idle_ms": idle_ms}
    assert dict(SERVER_OPTIONS).keys() >= limits.keys()
    monkeypatch.setattr(service, "SERVER_OPTIONS", tuple((dict(SERVER_OPTIONS) | limits).items()))
    monkeypatch.setattr(local_socket, "PATIENCE_S", 0.3)
    running = HostServer(MIXTURE.host([ExpertId(0, 0), ExpertId(0, 1)]), "token")
    yield running
    running.close()


class Router:
    """A good client with one stream, over gRPC."""

    def __init__(self, server: HostServer) -> None:
        self._channel = grpc.insecure_channel(server.address, (("grpc.use_local_subchannel_pool", 1),))
        self._turn = threading.Semaphore(0)
        self._open = True
        self._replies = HostStub(self._channel).Exchange(self._requests(), metadata=credentials("token"), timeout=60)

    def _requests(self) -> Iterator[pb.ExchangeRequest]:
        for number in itertools.count(1):
            self._turn.acquire()
            if not self._open:
                return
            rows = np.ones((1, 16), np.float32).tobytes()
            yield pb.ExchangeRequest(
                id=number, layer=0, dtype=pb.FLOAT32, num_rows=1, rows=rows, experts=[0], counts=[1], pair_rows=bytes(4)
            )

    def ask(self) -> None:
        self._turn.release()
        reply = next(self._replies)
        assert (reply.HasField("error"), len(reply.rows)) == (False, 64)

    def close(self) -> None:
        self._open = False
        self._turn.release()
        self._channel.close()


@pytest.fixture
def router(server: HostServer) -> Iterator[Router]:
    client = Router(server)
    client.ask()
    yield client
    client.ask()  # whatever a test has done, it is served
    client.close()


def connected(server: HostServer) -> socket.socket:
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), 10)


def is_hung_up(connection: socket.socket) -> bool:
    """Waits for it."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
"""An empty frame of them."""
NOISE = b"\xff" * 5000


@pytest.mark.parametrize("idle_ms", [300])
@pytest.mark.parametrize(
    "opening",
    [
        b"",
        PREFACE[:10],
        PREFACE,
        PREFACE + bytes(9),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 5000,
        PREFACE + b"\xff" * 5000,
    ],
    ids=["nothing", "half a greeting", "a greeting", "a greeting and settings", "HTTP/1", "noise", "greeted noise"],
)
def test_who_does_not_come_to_the_point_is_cut_off(server: HostServer, router: Router, opening: bytes) -> None:
    with connected(server) as stranger:
        stranger.sendall(opening)
        router.ask()
        assert is_hung_up(stranger)


def test_no_more_than_so_many_connect_and_who_is_connected_stays(server: HostServer, router: Router) -> None:
    crowd = [connected(server) for _ in range(12)]
    try:
        router.ask()
        assert all(is_hung_up(stranger) for stranger in crowd)
        newcomer = Router(server)
        newcomer.ask()
        newcomer.close()
    finally:
        for stranger in crowd:
            stranger.close()


def test_of_a_call_without_the_token_no_message_is_waited_for(server: HostServer, router: Router) -> None:
    never = threading.Event()
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_unary(f"/{pb.DESCRIPTOR.services_by_name['Host'].full_name}/Statistics")
        with pytest.raises(grpc.RpcError) as refused:
            call(iter(never.wait, True), metadata=credentials("wrong"), timeout=20)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    never.set()


def test_a_wrong_token_is_logged_once_however_often_it_comes(
    server: HostServer, router: Router, caplog: pytest.LogCaptureFixture
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        for i in range(20):
            with pytest.raises(grpc.RpcError) as refused:
                HostStub(channel).Statistics(pb.StatisticsRequest(), metadata=credentials(f"wrong{i}"), timeout=20)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert warnings(caplog) == ["refused ipv4:127.0.0.1: wrong or missing token"]


def test_a_message_above_the_limit_ends_its_own_call_only(server: HostServer, router: Router) -> None:
    with grpc.insecure_channel(server.address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
        huge = pb.ExchangeRequest(id=1, rows=bytes(2**20))
        with pytest.raises(grpc.RpcError) as refused:
            list(HostStub(channel).Exchange(iter([huge]), metadata=credentials("token"), timeout=20))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert HostStub(channel).Statistics(pb.StatisticsRequest(), metadata=credentials("token"), timeout=20)


def test_headers_above_the_limit_end_their_own_call_only(server: HostServer, router: Router) -> None:
    with grpc.insecure_channel(server.address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
        long = (*credentials("token"), ("x", "y" * 20_000))
        with pytest.raises(grpc.RpcError) as refused:
            HostStub(channel).Statistics(pb.StatisticsRequest(), metadata=long, timeout=20)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert HostStub(channel).Statistics(pb.StatisticsRequest(), metadata=credentials("token"), timeout=20)


# --- the local socket ------------------------------------------------------------------------------------------------


def test_who_shows_no_token_on_the_local_socket_is_cut_off(
    server: HostServer, router: Router, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(server.socket) as stranger:
        assert is_hung_up(stranger)
    (line,) = warnings(caplog)
    assert line.endswith("of this machine: no token within 0.3 s")


def test_who_was_refused_on_the_local_socket_may_not_stay(
    server: HostServer, router: Router, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        with connect(server.socket) as stranger:
            stranger.send(b"wrong")
            assert is_hung_up(stranger)
            router.ask()
    (line,) = warnings(caplog)
    assert line.endswith("of this machine: wrong or missing token")


def test_who_has_shown_the_token_stays(server: HostServer, router: Router) -> None:
    with connect(server.socket) as peer, connect(server.socket) as stranger:
        open_session(peer, "token")
        assert is_hung_up(stranger)  # who came later, and has been given up
        peer.send(local_request(3, layer=9))
        reply = read(peer)
        assert reply is not None
        assert reply.id == 3
