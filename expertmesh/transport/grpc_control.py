"""The controller's side of the host protocol: configure, load, drop, statistics. Values in and out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import HostStub
from expertmesh.errors import (
    CheckpointError,
    ConfigError,
    ExpertMeshError,
    OutOfSlotsError,
    ProtocolError,
    ReplicaUnavailableError,
    TrainingLostError,
)
from expertmesh.hosts.digest import ReplicaDigest
from expertmesh.hosts.statistics import HostStatistics, LaunchSums
from expertmesh.ids import ExpertId
from expertmesh.tls import live_identity
from expertmesh.transport import codec
from expertmesh.transport.grpc_link import credentials, open_channel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from expertmesh.checkpoint.recipe import ExpertRecipe
    from expertmesh.fault import Fault
    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.placement import HostInfo
    from expertmesh.tls import TlsFiles

T = TypeVar("T")

_CONTROL_TIMEOUT_S = 30.0
_INJECT_TIMEOUT_S = 5.0
_LOAD_TIMEOUT_S = 600.0


class GrpcHostControl:
    """Orders to one host. Lives on one event loop.

    Every method raises ReplicaUnavailableError when the host cannot be reached, and the typed error that the host
    answered with otherwise.
    """

    def __init__(self, host: HostInfo, token: str, *, tls: TlsFiles | None = None) -> None:
        self._host = host
        self._token = token
        self._tls = tls
        self._identity = None if tls is None else live_identity(tls).current()
        self._channels = [open_channel(host, tls)]

    @property
    def _stub(self) -> HostStub:
        return HostStub(self._channel)

    @property
    def _channel(self) -> grpc.aio.Channel:
        """One of the certificate that is in use now: one that has expired connects no more."""
        if self._tls is not None and self._identity is not (current := live_identity(self._tls).current()):
            self._identity = current
            self._channels.append(open_channel(self._host, self._tls))
        return self._channels[-1]

    async def configure(self, configuration: HostConfiguration) -> tuple[int, ...]:
        """Prepare it for a model: its slots per spec."""
        reply = await self._ask(
            self._stub.Configure(codec.encode_configuration(configuration), **self._options(_LOAD_TIMEOUT_S))
        )
        return tuple(reply.slots)

    async def load(self, expert: ExpertId, recipe: ExpertRecipe) -> ReplicaDigest:
        """Read an expert into a slot and test it. Raises CheckpointError or OutOfSlotsError. Idempotent."""
        message = codec.encode_recipe(expert.layer, expert.index, recipe)
        reply = await self._ask(self._stub.Load(message, **self._options(_LOAD_TIMEOUT_S)))
        return ReplicaDigest(weights=reply.digest.weights, answer=reply.digest.answer)

    async def verify(self, expert: ExpertId) -> ReplicaDigest:
        """Have a replica compute the known rows again."""
        message = pb.VerifyRequest(layer=expert.layer, index=expert.index)
        reply = await self._ask(self._stub.Verify(message, **self._options(_CONTROL_TIMEOUT_S)))
        return ReplicaDigest(weights=reply.digest.weights, answer=reply.digest.answer)

    async def drop(self, expert: ExpertId, *, not_after_s: float = 0.0) -> None:
        """Free an expert's slot, unless the host's clock is past `not_after_s`. Idempotent."""
        message = pb.DropRequest(layer=expert.layer, index=expert.index, not_after_s=not_after_s)
        await self._ask(self._stub.Drop(message, **self._options(_CONTROL_TIMEOUT_S)))

    async def inject(self, faults: Sequence[Fault], seed: int) -> Mapping[str, int]:
        """Have it misbehave from now on by these faults: per kind, how often it did so far. Raises ConfigError."""
        message = codec.encode_faults(faults, seed)
        return codec.decode_fired(await self._ask(self._stub.Inject(message, **self._options(_INJECT_TIMEOUT_S))))

    async def statistics(self) -> HostStatistics:
        """What it holds and has done."""
        reply = await self._ask(self._stub.Statistics(pb.StatisticsRequest(), **self._options(_CONTROL_TIMEOUT_S)))
        return HostStatistics(
            slots=tuple(reply.slots),
            memory_bytes=reply.memory_bytes,
            replicas=tuple((ExpertId(load.layer, load.index), load.rows) for load in reply.replicas),
            done=LaunchSums(*(getattr(reply.done, name) for name in LaunchSums._fields)),
            streams=reply.streams,
            at_s=reply.at_s,
        )

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    def _options(self, timeout_s: float) -> dict[str, Any]:
        # A host that is being started may not listen yet: wait for it, within the deadline.
        return {"metadata": credentials(self._token), "timeout": timeout_s, "wait_for_ready": True}

    async def _ask(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ReplicaUnavailableError(self._host.id, "the connection was closed") from None
        except grpc.aio.AioRpcError as error:
            kind = _ERRORS.get(error.code())
            if kind is not None:
                raise kind(error.details()) from error
            raise ReplicaUnavailableError(self._host.id, f"{error.code().name}: {error.details()}") from error


_ERRORS: dict[grpc.StatusCode, Callable[[Any], ExpertMeshError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: ProtocolError,
    grpc.StatusCode.FAILED_PRECONDITION: ConfigError,
    grpc.StatusCode.PERMISSION_DENIED: ConfigError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OutOfSlotsError,
    grpc.StatusCode.DATA_LOSS: CheckpointError,
    grpc.StatusCode.ABORTED: TrainingLostError,
}
