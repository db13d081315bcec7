"""What a host answers to messages that break the protocol: an error for that message, and nothing else is disturbed."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import torch

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import HostStub
from expertmesh.errors import ConfigError
from expertmesh.hosts.host import Host
from expertmesh.hosts.process import HostServer
from expertmesh.ids import ExpertId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.transport.grpc_link import credentials

HIDDEN = 8
MIXTURE = Mixture(ExpertSpec(hidden=HIDDEN, intermediate=12, activation=SILU), 1, 4)
HELD = [ExpertId(0, 0), ExpertId(0, 1)]


@pytest.fixture
def host() -> Host:
    return MIXTURE.host(HELD)


@pytest.fixture
def stub(host: Host) -> Iterator[HostStub]:
    server = HostServer(host, "token")
    with grpc.insecure_channel(server.address) as channel:
        yield HostStub(channel)
    server.close()


def message(**changes: object) -> pb.ExchangeRequest:
    """Two rows for experts 0 and 1, with some fields changed."""
    fields = {
        "id": 7,
        "layer": 0,
        "dtype": pb.FLOAT32,
        "num_rows": 2,
        "rows": np.ones((2, HIDDEN), np.float32).tobytes(),
        "experts": [0, 1],
        "counts": [2, 1],
        "pair_rows": struct.pack("<3i", 0, 1, 1),
    }
    return pb.ExchangeRequest(**(fields | changes))


def exchange(stub: HostStub, *messages: pb.ExchangeRequest) -> list[pb.ExchangeReply]:
    return list(stub.Exchange(iter(messages), metadata=credentials("token"), timeout=30))


BROKEN = {
    "layer": ({"layer": 1}, "layer 1"),
    "dtype": ({"dtype": pb.BFLOAT16}, "take float32"),
    "no dtype": ({"dtype": 0}, "take float32"),
    "no rows": ({"num_rows": 0, "rows": b""}, "one at least"),
    "short rows": ({"rows": b"\0" * 60}, "60 bytes"),
    "more rows than bytes": ({"num_rows": 2**31}, "rows"),
    "no expert": ({"experts": [], "counts": [], "pair_rows": b""}, "0 experts"),
    "count of zero": ({"counts": [3, 0]}, "one above 0"),
    "counts missing": ({"counts": [3]}, "2 experts with 1 counts"),
    "expert unknown to the model": ({"experts": [0, 4]}, "below 4"),
    "expert named twice": ({"experts": [1, 1]}, "named once"),
    "pairs beyond rows": ({"counts": [2**30, 2**30]}, "pairs"),
    "pair rows too short": ({"pair_rows": b"\0" * 8}, "pair_rows has 8 bytes"),
    "pair row out of range": ({"pair_rows": struct.pack("<3i", 0, 1, 2)}, "in 0 to 1"),
    "negative pair row": ({"pair_rows": struct.pack("<3i", 0, -1, 1)}, "in 0 to 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_message_gets_an_error_and_the_stream_goes_on(stub: HostStub, host: Host, name: str) -> None:
    changes, text = BROKEN[name]
    broken, good = exchange(stub, message(**changes), message(id=8))
    assert (broken.id, broken.error.code, broken.rows) == (7, pb.Error.INVALID, b"")
    assert text in broken.error.message
    assert (good.id, good.HasField("error"), len(good.rows)) == (8, False, 3 * HIDDEN * 4)
    assert host.statistics().done.rows == 3


def test_an_expert_held_elsewhere_is_not_ready(stub: HostStub) -> None:
    (reply,) = exchange(stub, message(experts=[0, 3]))
    assert (reply.error.code, reply.error.message) == (pb.Error.NOT_READY, "expert 0:3 is not held here")


def test_a_failing_launch_is_reported_and_the_host_lives_on(stub: HostStub, host: Host) -> None:
    compute, host._pools[0].kernel.run = host._pools[0].kernel.run, lambda *_: 1 / 0  # type: ignore[method-assign]
    (reply,) = exchange(stub, message())
    assert (reply.error.code, "ZeroDivisionError" in reply.error.message) == (pb.Error.FAILED, True)
    host._pools[0].kernel.run = compute  # type: ignore[method-assign]
    (reply,) = exchange(stub, message())
    assert not reply.HasField("error")


def test_every_call_needs_the_token(stub: HostStub) -> None:
    for call in (
        lambda: list(stub.Exchange(iter([message()]), metadata=credentials("wrong"), timeout=30)),
        lambda: list(stub.Exchange(iter([message()]), timeout=30)),
        lambda: stub.Statistics(pb.StatisticsRequest(), timeout=30),
        lambda: stub.Drop(pb.DropRequest(layer=0, index=0), metadata=credentials("tokenx"), timeout=30),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert len(stub.Statistics(pb.StatisticsRequest(), metadata=credentials("token")).replicas) == 2


def test_orders_about_unknown_experts_are_refused(stub: HostStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Load(pb.LoadRequest(layer=0, index=9), metadata=credentials("token"))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "expert 0:9: the model has none such"


def test_a_recipe_may_not_leave_the_checkpoint_folder(stub: HostStub) -> None:
    escape = pb.TensorRecipe(sources=[pb.TensorSource(file="../../etc/passwd", name="w")])
    with pytest.raises(grpc.RpcError) as caught:
        stub.Load(pb.LoadRequest(layer=0, index=2, w_in=escape, w_out=escape), metadata=credentials("token"))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_host_holds_no_more_than_its_slots() -> None:
    host = Host(memory_bytes=int(2.5 * Host(2**40).bytes_per_slot(MIXTURE.spec)))
    assert host.configure(MIXTURE.configuration) == (2,)
    for expert in HELD:
        host.write(expert, MIXTURE.weights(expert))
    with pytest.raises(Exception, match="no free slot for expert 0:2: all 2 hold replicas"):
        host.write(ExpertId(0, 2), MIXTURE.weights(ExpertId(0, 2)))
    host.drop(HELD[0])
    host.write(ExpertId(0, 2), MIXTURE.weights(ExpertId(0, 2)))
    assert [expert for expert, _ in host.statistics().replicas] == [HELD[1], ExpertId(0, 2)]


def test_memory_for_no_expert_is_an_error() -> None:
    with pytest.raises(ConfigError, match="holds no expert: one takes"):
        Host(memory_bytes=100).configure(MIXTURE.configuration)


def test_a_port_in_use_is_an_error() -> None:
    server = HostServer(MIXTURE.host([]), "token")
    port = int(server.address.rpartition(":")[2])
    try:
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 cannot be bound"):
            HostServer(MIXTURE.host([]), "token", port=port)
    finally:
        server.close()


def test_what_arrives_together_is_computed_in_one_launch() -> None:
    """Two routers' messages that wait while the host is busy share its next launch."""
    from expertmesh.hosts.batcher import Batcher
    from expertmesh.transport import LayerReply, LayerRequest

    host = MIXTURE.host(HELD)
    x = torch.randn(3, HIDDEN).view(torch.uint8).numpy()
    work = host.prepare(LayerRequest(0, "float32", x, np.arange(3, dtype=np.int32), [1], [3]))

    async def two_at_once() -> None:
        batcher = Batcher(host.compute)
        replies: asyncio.Queue[LayerReply | Exception] = asyncio.Queue()
        for _ in range(2):
            batcher.submit(work, replies.put_nowait)
        first, second = await replies.get(), await replies.get()
        assert first.rows.tobytes() == second.rows.tobytes()

    asyncio.run(two_at_once())
    assert (host.statistics().done.launches, host.statistics().done.rows) == (1, 6)
