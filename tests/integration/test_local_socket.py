"""What a host's local socket does with peers that are slow, broken or hostile."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from expertmesh._proto import host_pb2 as pb
from expertmesh.hosts.process import HostServer
from expertmesh.ids import ExpertId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.testing.experts import SILU, Mixture

MIXTURE = Mixture(ExpertSpec(hidden=16, intermediate=24, activation=SILU), 1, 2)
ROW = bytes(64)


@pytest.fixture
def server() -> Iterator[HostServer]:
    running = HostServer(MIXTURE.host([ExpertId(0, 0)]), "token")
    yield running
    running.close()


@pytest.fixture
def peer(server: HostServer) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(20)
        connection.connect(f"\0{server.socket}")
        yield connection


def frame(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<II", len(header), len(body)) + header + body


def request(request_id: int) -> bytes:
    message = pb.ExchangeRequest(
        id=request_id, layer=0, dtype=pb.FLOAT32, num_rows=1, experts=[0], counts=[1], pair_rows=bytes(4)
    )
    return frame(message.SerializeToString(), ROW)


def read(peer: socket.socket, number: int) -> list[pb.ExchangeReply]:
    """The next replies."""
    return [read_one(peer) for _ in range(number)]


def read_one(peer: socket.socket) -> pb.ExchangeReply:
    header, body = struct.unpack("<II", peer.recv(8, socket.MSG_WAITALL))
    reply = pb.ExchangeReply.FromString(peer.recv(header, socket.MSG_WAITALL))
    reply.rows = peer.recv(body, socket.MSG_WAITALL) if body else b""
    return reply


def assert_hung_up(peer: socket.socket) -> None:
    assert peer.recv(1) == b""


def test_messages_may_arrive_in_any_pieces(peer: socket.socket) -> None:
    data = frame(b"token") + request(7) + request(8)
    for i in range(0, len(data), 5):
        peer.sendall(data[i : i + 5])
    replies = read(peer, 2)
    assert [(reply.id, len(reply.rows)) for reply in replies] == [(7, 64), (8, 64)]


def test_several_messages_in_one_piece_are_each_answered(peer: socket.socket) -> None:
    peer.sendall(frame(b"token") + b"".join(request(i) for i in range(1, 21)))
    assert [reply.id for reply in read(peer, 20)] == list(range(1, 21))


@pytest.mark.parametrize(
    "opening",
    [frame(b"wrong"), frame(b""), request(1)],
    ids=["another token", "an empty token", "a request before the token"],
)
def test_without_the_token_nothing_is_computed(server: HostServer, peer: socket.socket, opening: bytes) -> None:
    peer.sendall(opening + request(2))
    refusal = read_one(peer)
    assert_hung_up(peer)
    assert (refusal.id, refusal.error.message) == (0, "UNAUTHENTICATED: wrong or missing token")


def test_before_the_token_little_is_read(peer: socket.socket) -> None:
    peer.sendall(struct.pack("<II", 4_000, 100_000_000))
    assert_hung_up(peer)


def test_a_message_above_the_limit_ends_the_connection(peer: socket.socket) -> None:
    peer.sendall(frame(b"token") + struct.pack("<II", 2**32 - 1, 2**32 - 1))
    assert_hung_up(peer)


def test_what_is_no_message_ends_the_connection(peer: socket.socket) -> None:
    peer.sendall(frame(b"token") + frame(b"\xff" * 40))
    refusal = read_one(peer)
    assert_hung_up(peer)
    assert (refusal.id, refusal.error.message) == (0, "a message that is no ExchangeRequest")


def test_one_bad_peer_does_not_disturb_another(server: HostServer, peer: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bad:
        bad.connect(f"\0{server.socket}")
        bad.sendall(frame(b"token") + frame(b"\xff"))
        peer.sendall(frame(b"token") + request(3))
        assert read_one(peer).id == 3


def test_a_closed_host_leaves_no_name(server: HostServer) -> None:
    server.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as late, pytest.raises(ConnectionRefusedError):
        late.connect(f"\0{server.socket}")
