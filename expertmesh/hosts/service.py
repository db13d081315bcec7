"""The gRPC service of a host (protos/host.proto): checks what comes in, hands it to the host, answers.

Errors become gRPC status codes, or error replies on the exchange stream, here and nowhere else.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import logging
import os
import time
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import HostServicer, add_HostServicer_to_server
from expertmesh.checkpoint.read import read_expert
from expertmesh.checkpoint.source import resolve
from expertmesh.errors import CheckpointError, ConfigError, OutOfSlotsError, ProtocolError
from expertmesh.hosts.local_socket import LocalSocket
from expertmesh.hosts.rows import RowService
from expertmesh.ids import ExpertId
from expertmesh.transport import codec
from expertmesh.transport.grpc_link import SERVER_OPTIONS
from expertmesh.transport.socket_link import listen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from expertmesh.hosts.host import Host

logger = logging.getLogger(__name__)

T = TypeVar("T")


class HostService(HostServicer):
    """Serves one host on one event loop, which is also where it computes."""

    def __init__(self, host: Host, rows: RowService) -> None:
        self._host = host
        self._rows = rows
        self._root: Path | None = None
        self.asked_at = time.monotonic()
        """When the controller last asked for statistics."""

    async def Exchange(
        self, requests: AsyncIterator[pb.ExchangeRequest], _context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ExchangeReply]:
        loop = asyncio.get_running_loop()
        self._rows.connections += 1
        try:
            async for message in requests:
                reply: asyncio.Future[pb.ExchangeReply] = loop.create_future()
                self._rows.submit(message, message.rows, functools.partial(_resolve, reply))
                yield await reply
        finally:
            self._rows.connections -= 1

    async def Configure(
        self, message: pb.ConfigureRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ConfigureReply:
        async def configure() -> pb.ConfigureReply:
            configuration = codec.decode_configuration(message)
            self._root = await asyncio.to_thread(resolve, configuration.checkpoint)
            return pb.ConfigureReply(slots=self._host.configure(configuration))

        return await _answered(configure, context)

    async def Load(self, message: pb.LoadRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.LoadReply:
        async def load() -> pb.LoadReply:
            expert, recipe = self._expert(message.layer, message.index), codec.decode_recipe(message)
            assert self._host.configuration is not None
            if self._root is None:
                raise ProtocolError("the host was not told of a checkpoint")
            if not self._host.holds(expert):
                # Reading takes milliseconds to seconds and must not hold up the rows that others wait for.
                spec = self._host.configuration.spec(expert.layer)
                weights = await asyncio.to_thread(read_expert, self._root, recipe, spec)
                self._host.write(expert, weights)
            return pb.LoadReply()

        return await _answered(load, context)

    async def Drop(self, message: pb.DropRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.DropReply:
        async def drop() -> pb.DropReply:
            if message.not_after_s and time.monotonic() > message.not_after_s:
                # The controller gave it up long ago, and may have told routers of the replica since.
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the order to drop came too late")
            self._host.drop(self._expert(message.layer, message.index))
            return pb.DropReply()

        return await _answered(drop, context)

    async def Statistics(
        self, _message: pb.StatisticsRequest, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.StatisticsReply:
        self.asked_at = time.monotonic()
        statistics = self._host.statistics()
        replicas = [pb.ExpertLoad(layer=e.layer, index=e.index, rows=rows) for e, rows in statistics.replicas]
        return pb.StatisticsReply(
            slots=statistics.slots,
            memory_bytes=statistics.memory_bytes,
            replicas=replicas,
            done=pb.LaunchSums(**statistics.done._asdict()),
            streams=self._rows.connections,
            process_id=os.getpid(),
            at_s=statistics.at_s,
        )

    def _expert(self, layer: int, index: int) -> ExpertId:
        configuration = self._host.configuration
        if configuration is None:
            raise ProtocolError("the host is not configured yet")
        if layer >= configuration.num_layers or index >= configuration.layer_experts[layer]:
            raise ProtocolError(f"expert {layer}:{index}: the model has none such")
        return ExpertId(layer, index)


def _resolve(reply: asyncio.Future[pb.ExchangeReply], message: pb.ExchangeReply, rows: NDArray[np.uint8]) -> None:
    if not reply.cancelled():  # else the router has gone
        message.rows = rows.tobytes()
        reply.set_result(message)


_STATUS = (
    (ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (OutOfSlotsError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (CheckpointError, grpc.StatusCode.DATA_LOSS),
)


async def _answered(call: Callable[[], Awaitable[T]], context: grpc.aio.ServicerContext[Any, Any]) -> T:
    """The call's result; our errors become the status that the controller reads back."""
    try:
        return await call()
    except tuple(kind for kind, _ in _STATUS) as error:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        await context.abort(status, str(error))


class _TokenCheck(grpc.aio.ServerInterceptor):
    """Ends every call that does not carry the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

        async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
            logger.warning("refused a call from %s: wrong or missing token", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing token")

        self._refuse: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        given = dict(details.invocation_metadata or ()).get("authorization", "")
        if isinstance(given, str) and hmac.compare_digest(given.encode(), self._expected):
            return await continuation(details)
        return self._refuse


class RunningServer:
    """A host's service, reachable over gRPC and, on its own machine, over a local socket."""

    def __init__(self, server: grpc.aio.Server, port: int, service: HostService, rows: RowService) -> None:
        self._server = server
        self._service = service
        self._rows = rows
        self._local: LocalSocket | None = None
        self.port = port
        self.socket = ""

    @property
    def idle_s(self) -> float:
        """For how long nobody has needed this host: no router connected, no controller asking."""
        return 0.0 if self._rows.connections else time.monotonic() - self._service.asked_at

    @staticmethod
    async def start(host: Host, token: str, bind: str = "127.0.0.1", port: int = 0) -> RunningServer:
        """Serve `host` at once. Raises ConfigError when the port is taken."""
        rows = RowService(host)
        server = grpc.aio.server(interceptors=(_TokenCheck(token),), options=SERVER_OPTIONS)
        service = HostService(host, rows)
        add_HostServicer_to_server(service, server)
        try:
            bound = server.add_insecure_port(f"{bind}:{port}")
        except RuntimeError as error:
            raise ConfigError(f"port {port} on {bind} cannot be bound; is it in use?") from error
        await server.start()
        running = RunningServer(server, bound, service, rows)
        if (listening := listen()) is not None:
            listener, running.socket = listening
            running._local = LocalSocket(asyncio.get_running_loop(), listener, rows, token)
        return running

    async def stop(self) -> None:
        """Break all connections."""
        if self._local is not None:
            self._local.close()
        await self._server.stop(grace=0)
