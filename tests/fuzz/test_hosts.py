"""A host that runs, under any bytes and messages: it answers a good router, bit for bit, after each of them."""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import struct
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import HostStub
from expertmesh.hosts.local_socket import MAX_STRANGERS
from expertmesh.hosts.process import HostServer
from expertmesh.transport.grpc_link import credentials
from tests.fuzz.fuzzing import damaged, edges, fuzzed
from tests.fuzz.messages import HELD, MIXTURE, UINT32, configurations, good, recipes, requests, specs
from tests.local_peer import connect, local_request, open_session, read

TOKEN = "token"
DECIDED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DATA_LOSS)
"""How a host refuses an order that makes no sense."""


class Router:
    """A good router on both ways in, which stays connected throughout."""

    def __init__(self, server: HostServer) -> None:
        self.name = server.socket
        self.peer = connect(server.socket)
        self._memory = open_session(self.peer, TOKEN)
        self.channel = grpc.insecure_channel(server.address)
        self.stub = HostStub(self.channel)
        self._sent: queue.SimpleQueue[pb.ExchangeRequest | None] = queue.SimpleQueue()
        self._replies = self.stub.Exchange(iter(self._sent.get, None), metadata=credentials(TOKEN))
        self.expected = (b"", 0)
        self.expected = self.over_socket()

    def exchange(self, message: pb.ExchangeRequest) -> pb.ExchangeReply:
        """Over the gRPC stream."""
        self._sent.put(message)
        return next(self._replies)

    def over_socket(self) -> tuple[bytes, int]:
        shape = lay_out(good(7), self._memory)
        self.peer.send(local_request(7, **shape))
        reply = read(self.peer)
        assert reply is not None
        first = shape["num_rows"] * shape["row_bytes"]
        rows = self._memory[first : first + shape["num_pairs"] * shape["row_bytes"]]
        return (b"" if reply.error else rows), reply.error

    def check(self) -> None:
        assert self.over_socket() == self.expected
        reply = self.exchange(good(8))
        assert (reply.rows, reply.error.code) == self.expected

    def close(self) -> None:
        self._sent.put(None)
        self.peer.close()
        self.channel.close()


@pytest.fixture(scope="module")
def router() -> Iterator[Router]:
    server = HostServer(MIXTURE.host(HELD), TOKEN)
    router = Router(server)
    assert len(router.expected[0]) == 3 * 64
    yield router
    router.check()
    router.close()
    server.close()


def lay_out(request: pb.ExchangeRequest, memory: Any) -> dict[str, int]:
    """Put a request at the start of shared memory: what its message says of it."""
    tables = request.pair_rows + struct.pack(f"<{2 * len(request.experts)}I", *request.experts, *request.counts)
    num_pairs, row_bytes = sum(request.counts), len(request.rows) // request.num_rows
    data = request.rows + bytes(num_pairs * row_bytes) + tables
    memory[: len(data)] = data
    return {
        "layer": request.layer,
        "dtype": request.dtype,
        "num_rows": request.num_rows,
        "row_bytes": row_bytes,
        "num_pairs": num_pairs,
        "num_experts": len(request.experts),
    }


def status(call: Callable[..., Any], message: Any) -> grpc.StatusCode | None:
    """How an order was refused; None for one that was carried out."""
    try:
        call(message, metadata=credentials(TOKEN), timeout=30)
    except grpc.RpcError as error:
        return error.code()
    return None


@fuzzed(150)
@given(
    st.lists(st.sampled_from([TOKEN.encode(), b"memory"]) | st.binary(min_size=1, max_size=60), max_size=4),
    st.booleans(),
)
def test_any_messages_on_the_local_socket_disturb_nobody(router, messages, hangs_up) -> None:
    peer = connect(router.name)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have been cut off
        for data in messages:
            peer.send(data)
    if hangs_up:
        peer.close()
    router.check()
    peer.close()


FIELDS = ("start", "layer", "dtype", "num_rows", "row_bytes", "num_pairs", "num_experts")


@fuzzed(200)
@given(st.dictionaries(st.sampled_from(FIELDS), edges(UINT32)), st.binary(max_size=200), st.integers(0, 800))
def test_any_request_in_shared_memory_is_answered_or_refused_and_disturbs_nobody(router, changes, noise, at) -> None:
    peer = connect(router.name)
    memory = open_session(peer, TOKEN)
    shape = lay_out(good(5), memory)
    memory[at : at + len(noise)] = noise
    peer.send(local_request(5, **(shape | changes)))
    memory[at : at + len(noise)] = bytes(len(noise))  # while it is read, perhaps
    reply = read(peer)
    assert reply is not None
    assert reply.id in (0, 5)
    router.check()
    peer.close()


def test_many_who_connect_and_say_nothing_keep_nobody_out(router) -> None:
    """Far more than a process may have descriptors for by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    before = len(os.listdir("/proc/self/fd"))
    silent = []
    try:
        for number in range(600):
            silent.append(connect(router.name))
            if number % 2:
                silent[-1].send(b"tok")
        router.check()
        ours = len(silent)
        assert len(os.listdir("/proc/self/fd")) - before <= ours + MAX_STRANGERS + 8
    finally:
        for peer in silent:
            peer.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@fuzzed(150)
@given(requests())
def test_any_request_gets_one_reply_and_the_stream_goes_on(router, message) -> None:
    reply = router.exchange(message)
    assert reply.id == message.id
    assert reply.error.code in (0, pb.Error.INVALID, pb.Error.NOT_READY)
    assert len(reply.rows) == (0 if reply.HasField("error") else 64 * sum(message.counts))
    router.check()


@fuzzed(80)
@given(damaged(good(1).SerializeToString()) | st.binary(max_size=80))
def test_bytes_that_are_no_message_end_their_own_stream_only(router, data) -> None:
    raw = router.channel.stream_stream("/expertmesh.host.v1.Host/Exchange")
    with contextlib.suppress(grpc.RpcError):
        for reply in raw(iter([data]), metadata=credentials(TOKEN), timeout=10):
            pb.ExchangeReply.FromString(reply)
    router.check()


@fuzzed(50)
@given(recipes, st.booleans())
def test_any_order_to_load_is_decided_upon(router, message, is_known) -> None:
    if is_known:
        message.layer, message.index = 1, 3
    with pytest.raises(grpc.RpcError) as refusal:
        router.stub.Load(message, metadata=credentials(TOKEN), timeout=10)
    assert refusal.value.code() in DECIDED, refusal.value.details()
    router.check()


@fuzzed(40)
@given(edges(2**32 - 1), edges(2**32 - 1), st.floats(allow_nan=True))
def test_any_order_to_drop_or_verify_is_decided_upon(router, layer, index, not_after_s) -> None:
    if index < 3:  # held, and wanted
        index = 3
    for call, message in (
        (router.stub.Drop, pb.DropRequest(layer=layer, index=index, not_after_s=not_after_s)),
        (router.stub.Verify, pb.VerifyRequest(layer=layer, index=index)),
    ):
        code = status(call, message)
        assert code in (None, *DECIDED, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DEADLINE_EXCEEDED)
    router.check()


@pytest.fixture(scope="module")
def unused() -> Iterator[HostStub]:
    """A host that nobody relies on, with 64 KiB for experts."""
    from expertmesh.hosts.host import Host

    server = HostServer(Host(2**16), TOKEN)
    with grpc.insecure_channel(server.address) as channel:
        yield HostStub(channel)
    server.close()


@fuzzed(60)
@given(
    configurations
    | st.builds(
        lambda spec, experts: pb.ConfigureRequest(
            checkpoint="tiny", specs=[spec], layer_specs=[0], layer_experts=[experts]
        ),
        specs,
        edges(2**32 - 1),
    )
)
@example(
    pb.ConfigureRequest(
        checkpoint="tiny",
        specs=[pb.ExpertSpec(hidden=2**20, intermediate=2**20, gated=True, activation="silu", dtype=pb.FLOAT32)],
        layer_specs=[0],
        layer_experts=[1],
    )
)
def test_any_configuration_is_taken_or_refused(unused, monkeypatch_module, message) -> None:
    code = status(unused.Configure, message)
    assert code in (None, *DECIDED)
    now = unused.Statistics(pb.StatisticsRequest(), metadata=credentials(TOKEN), timeout=10)
    assert 0 <= sum(now.slots) <= 2**16


@pytest.fixture(scope="module", autouse=True)
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    """No name of a checkpoint may lead to the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield patch
