"""The controller's side of the host protocol: configure, load, drop, statistics. Values in and out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import HostStub
from expertmesh.errors import CheckpointError, ConfigError, OutOfSlotsError, ProtocolError, ReplicaUnavailableError
from expertmesh.hosts.statistics import HostStatistics, LaunchSums
from expertmesh.ids import ExpertId
from expertmesh.transport import codec
from expertmesh.transport.grpc_link import CHANNEL_OPTIONS, credentials

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from expertmesh.checkpoint.recipe import ExpertRecipe
    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.placement import HostInfo

T = TypeVar("T")

_CONTROL_TIMEOUT_S = 30.0
_LOAD_TIMEOUT_S = 600.0


class GrpcHostControl:
    """Orders to one host. Lives on one event loop.

    Every method raises ReplicaUnavailableError when the host cannot be reached, and the typed error that the host
    answered with otherwise.
    """

    def __init__(self, host: HostInfo, token: str) -> None:
        self._host = host
        self._token = token
        self._channel = grpc.aio.insecure_channel(host.address, options=CHANNEL_OPTIONS)
        self._stub = HostStub(self._channel)

    async def configure(self, configuration: HostConfiguration) -> tuple[int, ...]:
        """Prepare it for a model: its slots per spec."""
        reply = await self._ask(
            self._stub.Configure(codec.encode_configuration(configuration), **self._options(_LOAD_TIMEOUT_S))
        )
        return tuple(reply.slots)

    async def load(self, expert: ExpertId, recipe: ExpertRecipe) -> None:
        """Read an expert into a slot. Raises CheckpointError or OutOfSlotsError. Idempotent."""
        message = codec.encode_recipe(expert.layer, expert.index, recipe)
        await self._ask(self._stub.Load(message, **self._options(_LOAD_TIMEOUT_S)))

    async def drop(self, expert: ExpertId, *, not_after_s: float = 0.0) -> None:
        """Free an expert's slot, unless the host's clock is past `not_after_s`. Idempotent."""
        message = pb.DropRequest(layer=expert.layer, index=expert.index, not_after_s=not_after_s)
        await self._ask(self._stub.Drop(message, **self._options(_CONTROL_TIMEOUT_S)))

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
        await self._channel.close()

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


_ERRORS: dict[grpc.StatusCode, type[ConfigError | CheckpointError | OutOfSlotsError | ProtocolError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: ProtocolError,
    grpc.StatusCode.FAILED_PRECONDITION: ConfigError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OutOfSlotsError,
    grpc.StatusCode.DATA_LOSS: CheckpointError,
}
