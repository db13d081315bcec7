"""What a host's local socket does with peers that are slow, broken or hostile, and a router with such a host."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from expertmesh._proto import host_pb2 as pb
from expertmesh.hosts.process import HostServer
from expertmesh.ids import ExpertId, HostId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.placement import HostInfo
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.transport import LayerRequest
from expertmesh.transport.network import NetworkTransport
from expertmesh.transport.shared_memory import MAX_BYTES, SharedMemory
from tests.local_peer import SIZE, connect, is_hung_up, local_request, open_session, read, sealed, share

MIXTURE = Mixture(ExpertSpec(hidden=16, intermediate=24, activation=SILU), 1, 2)
HELD = [ExpertId(0, 0)]
ROW = np.arange(16, dtype=np.float32)
TABLES = struct.pack("<3I", 0, 0, 1)
"""Of one pair: it takes row 0, and is for expert 0, which has one pair."""


@pytest.fixture
def server() -> Iterator[HostServer]:
    running = HostServer(MIXTURE.host(HELD), "token")
    yield running
    running.close()


@pytest.fixture
def peer(server: HostServer) -> Iterator[socket.socket]:
    with connect(server.socket) as connection:
        yield connection


@pytest.fixture(scope="module")
def expected() -> bytes:
    host = MIXTURE.host(HELD)
    rows = ROW.view(np.uint8).reshape(1, 64)
    request = LayerRequest(0, "float32", rows, np.zeros(1, np.int32), [0], [1])
    return host.compute([host.prepare(request)])[0].rows.tobytes()


def request_at(start: int) -> bytes:
    """What lies in memory from `start` on: the row, room for the reply, the tables."""
    return ROW.tobytes() + bytes(64) + TABLES


def test_rows_go_and_come_through_the_memory(peer: socket.socket, expected: bytes) -> None:
    memory = open_session(peer, "token")
    for number in range(1, 21):
        start = 256 * number
        memory[start : start + 140] = request_at(start)
        peer.send(local_request(number, start=start))
    for number in range(1, 21):
        reply = read(peer)
        assert reply is not None
        assert (reply.id, reply.error) == (number, 0)
        assert memory[256 * number + 64 : 256 * number + 128] == expected


@pytest.mark.parametrize("token", ["wrong", "tokens", local_request(1).hex()])
def test_without_the_token_nothing_is_read(server: HostServer, peer: socket.socket, token: str) -> None:
    open_session(peer, token)
    peer.send(local_request(2))
    refusal = read(peer)
    assert refusal is not None
    assert (refusal.id, refusal.message) == (0, "UNAUTHENTICATED: wrong or missing token")
    assert is_hung_up(peer)


def no_memory() -> int:
    return os.open("/dev/null", os.O_RDWR)


def plain_file() -> int:
    descriptor = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(descriptor, SIZE)
    return descriptor


@pytest.mark.parametrize(
    "make",
    [
        no_memory,
        plain_file,
        lambda: sealed(seals=0),
        lambda: sealed(size=0),
        lambda: sealed(size=MAX_BYTES + 4096),
        lambda: sealed(size=2**21, flags=os.MFD_HUGETLB),
    ],
    ids=["a device", "a file", "it may shrink", "none", "too much", "pages that may be missing"],
)
def test_memory_that_could_fail_the_host_is_refused(server: HostServer, peer: socket.socket, make) -> None:
    peer.send(b"token")
    share(peer, make())
    refusal = read(peer)
    assert refusal is not None
    assert (refusal.id, refusal.message) == (0, "the memory to share must be sealed, and of its proper size")
    assert is_hung_up(peer)


def test_a_request_before_the_memory_is_refused(peer: socket.socket) -> None:
    peer.send(b"token")
    peer.send(local_request(1))
    refusal = read(peer)
    assert refusal is not None
    assert refusal.id == 0


@pytest.mark.parametrize(
    "data",
    [
        local_request(1)[:-1],
        local_request(1) + b"x",
        local_request(1, start=SIZE),
        local_request(1, start=SIZE - 100),
        local_request(1, start=2**64 - 1),
        local_request(1, num_rows=2**32 - 1),
        local_request(1, num_pairs=2**32 - 1),
        local_request(1, row_bytes=2**32 - 1),
        local_request(1, num_experts=2**32 - 1),
    ],
)
def test_what_lies_beyond_the_memory_ends_the_connection(peer: socket.socket, data: bytes) -> None:
    open_session(peer, "token")
    peer.send(data)
    refusal = read(peer)
    assert refusal is not None
    assert refusal.id == 0
    assert is_hung_up(peer)


@pytest.mark.parametrize(
    ("changes", "tables", "cause"),
    [
        ({"layer": 1}, TABLES, "layer 1"),
        ({"dtype": 2}, TABLES, "take float32"),
        ({"num_rows": 0}, TABLES, "one at least"),
        ({"row_bytes": 32}, TABLES, "take 64"),
        ({"num_experts": 0}, TABLES, "0 experts"),
        ({}, struct.pack("<3I", 1, 0, 1), "in 0 to 0"),
        ({}, struct.pack("<3I", 2**32 - 1, 0, 1), "in 0 to 0"),
        ({}, struct.pack("<3I", 0, 2, 1), "below 2"),
        ({}, struct.pack("<3I", 0, 0, 2), "pair_rows"),
        ({}, struct.pack("<3I", 0, 0, 2**32 - 1), "pairs"),
    ],
)
def test_a_broken_request_gets_an_error_and_the_next_one_its_answer(
    peer: socket.socket, expected: bytes, changes: dict[str, int], tables: bytes, cause: str
) -> None:
    memory = open_session(peer, "token")
    size = changes.get("row_bytes", 64) * (changes.get("num_rows", 1) + 1)
    memory[size : size + 12] = tables
    peer.send(local_request(7, **changes))
    broken = read(peer)
    memory[:140] = request_at(0)
    peer.send(local_request(8))
    good = read(peer)
    assert broken is not None
    assert good is not None
    assert (broken.id, broken.error) == (7, pb.Error.INVALID)
    assert cause in broken.message
    assert (good.id, good.error, memory[64:128]) == (8, 0, expected)


def test_a_peer_that_never_reads_is_given_up(peer: socket.socket) -> None:
    memory = open_session(peer, "token")
    memory[:140] = request_at(0)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for number in range(1, 100_000):
            peer.send(local_request(number))
        pytest.fail("it may ask as often as it likes")
    replies = 0
    with contextlib.suppress(ConnectionResetError):
        while read(peer):
            replies += 1
    assert replies < 5_000


def test_one_bad_peer_does_not_disturb_another(server: HostServer, peer: socket.socket, expected: bytes) -> None:
    with connect(server.socket) as bad:
        open_session(bad, "token")
        bad.send(b"\xff")
        memory = open_session(peer, "token")
        memory[:140] = request_at(0)
        peer.send(local_request(3))
        reply = read(peer)
        assert reply is not None
        assert (reply.id, memory[64:128]) == (3, expected)


def test_a_closed_host_leaves_no_name(server: HostServer) -> None:
    server.close()
    with pytest.raises(ConnectionRefusedError):
        connect(server.socket)


# --- the memory ------------------------------------------------------------------------------------------------------


def test_no_byte_is_handed_out_twice() -> None:
    memory = SharedMemory()
    places = [memory.take(size) for size in (1, 4096, 4097, 10)]
    assert places == [0, 4096, 8192, 16384]
    memory.give_back(4096)
    assert memory.take(5000) == 20480
    assert memory.take(4000) == 4096
    assert memory.take(MAX_BYTES) is None
    memory.close()


def test_what_was_large_does_not_stay() -> None:
    memory = SharedMemory()
    size = MAX_BYTES // 4
    start = memory.take(size)
    assert start == 0
    memory.bytes[:size] = bytes(size)
    memory.give_back(start)
    assert os.fstat(memory.descriptor).st_blocks * 512 <= 64 * 2**20
    memory.close()


# --- a router --------------------------------------------------------------------------------------------------------


def mappings() -> int:
    with open("/proc/self/maps") as lines:
        return sum("memfd:expertmesh" in line for line in lines)


def test_a_link_that_ends_leaves_nothing_mapped(server: HostServer) -> None:
    gc.collect()  # rows of other tests' answers keep what they lie in
    descriptors = len(os.listdir("/proc/self/fd"))
    info = HostInfo(id=HostId("h"), address="127.0.0.1:9", socket=server.socket)
    request = LayerRequest(0, "float32", np.zeros((1, 64), np.uint8), np.zeros(1, np.int32), [0], [1])
    transport = NetworkTransport("token")
    transport.send(info, request)
    assert transport.receive(20)
    assert mappings() == 2  # the router's, and the host's in a thread of this process
    server.close()
    transport.send(info, request)
    transport.close()
    assert mappings() == 0
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_host_that_leaves_requests_unread_is_given_up() -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")
    listener.listen()
    info = HostInfo(id=HostId("h"), address="127.0.0.1:9", socket=listener.getsockname()[1:].decode())
    request = LayerRequest(0, "float32", np.zeros((1, 64), np.uint8), np.zeros(1, np.int32), [0], [1])
    transport = NetworkTransport("token")
    tickets = []
    while not (answers := transport.receive(0)):
        tickets.append(transport.send(info, request))
        assert len(tickets) < 5_000
    assert {answer.ticket for answer in answers} == set(tickets)
    assert all("unread" in str(answer.outcome) for answer in answers)
    transport.close()
    listener.close()
