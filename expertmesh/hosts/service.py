"""The gRPC service of a host (protos/host.proto): checks what comes in, hands it to the host, answers.

Errors become gRPC status codes, or error replies on the exchange stream, here and nowhere else.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from typing import TYPE_CHECKING, Any

import grpc

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import HostServicer
from expertmesh.checkpoint.read import read_expert
from expertmesh.checkpoint.source import resolve
from expertmesh.errors import CheckpointError, ProtocolError
from expertmesh.fault import FaultKind
from expertmesh.hosts import selftest
from expertmesh.hosts.answering import answered, handlers
from expertmesh.hosts.door import TokenCheck, open_port
from expertmesh.hosts.local_socket import LocalSocket
from expertmesh.hosts.rows import Refusal, RowService
from expertmesh.hosts.training_service import TrainingService
from expertmesh.ids import ExpertId
from expertmesh.transport import LayerReply, codec
from expertmesh.transport.grpc_link import SERVER_OPTIONS
from expertmesh.transport.socket_link import listen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    import torch

    from expertmesh.checkpoint.recipe import ExpertRecipe
    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.hosts.faults import Faults
    from expertmesh.hosts.host import Host
    from expertmesh.kernels.spec import ExpertSpec, ExpertWeights
    from expertmesh.tls import TlsFiles

logger = logging.getLogger(__name__)


class HostService(HostServicer):
    """Serves one host on one event loop, which is also where it computes."""

    def __init__(self, host: Host, rows: RowService, faults: Faults | None = None) -> None:
        """`faults`: those of a host that was started to be broken."""
        self._host = host
        self._rows = rows
        self._faults = faults
        self.root: Path | None = None
        """What recipes' files are relative to."""
        self.recipes: dict[ExpertId, ExpertRecipe] = {}
        """How each replica was read."""
        self._read_as: dict[ExpertId, bytes] = {}
        """The digest of every replica's weights, as they were read."""
        self.asked_at = time.monotonic()
        """When the controller last asked for statistics."""

    async def exchange(
        self,
        requests: AsyncIterator[tuple[pb.ExchangeRequest, codec.Buffer]],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[bytes]:
        """The method Exchange, on messages as `codec` reads and writes them."""
        await context.send_initial_metadata(())  # the router sends no row before it has been let in
        answers: asyncio.Queue[bytes] = asyncio.Queue()
        self._rows.connections += 1
        try:
            async for message, rows in requests:
                self._rows.submit(message, rows, functools.partial(_put, answers, message.id))
                replies = [await answers.get()]
                while not answers.empty():  # a fault has had it answered twice
                    replies.append(answers.get_nowait())
                for reply in replies:
                    if reply:
                        yield reply
        finally:
            self._rows.connections -= 1

    async def Configure(
        self, message: pb.ConfigureRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ConfigureReply:
        async def configure() -> pb.ConfigureReply:
            configuration = codec.decode_configuration(message)
            self._read_as.clear()
            self.recipes.clear()
            self.root = await asyncio.to_thread(resolve, configuration.checkpoint)
            return pb.ConfigureReply(slots=self._host.configure(configuration))

        return await answered(configure, context)

    async def Load(self, message: pb.LoadRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.LoadReply:
        async def load() -> pb.LoadReply:
            expert, recipe = self._expert(message.layer, message.index), codec.decode_recipe(message)
            if self._faults is not None and self._faults.hits(FaultKind.FAIL_LOAD):
                raise CheckpointError(f"expert {expert}: this load was made to fail")
            assert self._host.configuration is not None
            if self.root is None:
                raise ProtocolError("the host was not told of a checkpoint")
            if self._host.holds(expert):
                y_RH = self._answer(expert)
            else:
                y_RH = await self._read(expert, recipe, self.root, self._host.configuration)
            return pb.LoadReply(digest=self._digest(expert, y_RH))

        return await answered(load, context)

    async def _read(self, expert: ExpertId, recipe: ExpertRecipe, root: Path, asked: HostConfiguration) -> torch.Tensor:
        """Fill a slot, and keep it only if it computes what was read: its answer to the known rows."""
        # Reading takes milliseconds to seconds and must not hold up the rows that others wait for.
        weights, expected = await asyncio.to_thread(_read_expert, root, recipe, asked.spec(expert.layer))
        if self._host.configuration is not asked:
            raise ProtocolError("the host was configured anew while it read")
        self._host.write(expert, weights)
        try:
            y_RH = self._answer(expert)
            selftest.check(y_RH, expected)
        except CheckpointError as error:
            self._host.drop(expert)
            files = ", ".join(recipe.files)
            raise CheckpointError(f"expert {expert}, read from {files} in {root}: {error}") from error
        self._read_as[expert] = expected.weights
        self.recipes[expert] = recipe
        return y_RH

    def _answer(self, expert: ExpertId) -> torch.Tensor:
        """A replica's, to the known rows. Raises NotHeldError."""
        assert self._host.configuration is not None
        return self._host.answer(expert, selftest.known_rows(self._host.configuration.spec(expert.layer)))

    def _digest(self, expert: ExpertId, y_RH: torch.Tensor) -> pb.ReplicaDigest:
        return pb.ReplicaDigest(weights=self._read_as.get(expert, b""), answer=selftest.digest_of(y_RH))

    async def Verify(self, message: pb.VerifyRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.VerifyReply:
        async def verify() -> pb.VerifyReply:
            expert = self._expert(message.layer, message.index)
            return pb.VerifyReply(digest=self._digest(expert, self._answer(expert)))

        return await answered(verify, context)

    async def Drop(self, message: pb.DropRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.DropReply:
        async def drop() -> pb.DropReply:
            if message.not_after_s and time.monotonic() > message.not_after_s:
                # The controller gave it up long ago, and may have told routers of the replica since.
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the order to drop came too late")
            expert = self._expert(message.layer, message.index)
            self._host.drop(expert)
            self.recipes.pop(expert, None)
            return pb.DropReply()

        return await answered(drop, context)

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

    async def Inject(self, message: pb.InjectRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.InjectReply:
        if (faults := self._faults) is None:
            refusal = "this host was not started to be broken: say `faults: true` in the config"
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)

        async def inject() -> pb.InjectReply:
            faults.replace(codec.decode_faults(message), message.seed)
            return codec.encode_fired(faults.fired)

        return await answered(inject, context)

    def _expert(self, layer: int, index: int) -> ExpertId:
        configuration = self._host.configuration
        if configuration is None:
            raise ProtocolError("the host is not configured yet")
        if layer >= configuration.num_layers or index >= configuration.layer_experts[layer]:
            raise ProtocolError(f"expert {layer}:{index}: the model has none such")
        return ExpertId(layer, index)


def _read_expert(root: Path, recipe: ExpertRecipe, spec: ExpertSpec) -> tuple[ExpertWeights, selftest.Expected]:
    weights = read_expert(root, recipe, spec)
    return weights, selftest.expect(weights, spec)


def _put(answers: asyncio.Queue[bytes], request_id: int, answer: LayerReply | Refusal | None) -> None:
    if answer is None:
        answers.put_nowait(b"")
    elif isinstance(answer, LayerReply):
        answers.put_nowait(codec.encode_reply(request_id, answer))
    else:
        answers.put_nowait(codec.encode_refusal(request_id, *answer))


class _Deafness(grpc.aio.ServerInterceptor):
    """While the host is made to be silent, reads nothing but the order that may end it."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if not str(details.method).endswith("/Inject"):
            await self._faults.wait_heard()
        return await continuation(details)


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
    async def start(
        host: Host,
        token: str,
        bind: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: TlsFiles | None = None,
        faults: Faults | None = None,
        train: Path | None = None,
    ) -> RunningServer:
        """Serve `host` at once, and as its `faults` let it. It may be trained if `train` is given, the folder that it
        saves in. Raises ConfigError when the port is taken, or the `tls` files will not do."""
        rows = RowService(host, faults)
        interceptors: list[grpc.aio.ServerInterceptor] = [TokenCheck(token)]
        if faults is not None:
            interceptors.append(_Deafness(faults))
        server = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
        service = HostService(host, rows, faults)
        exchange: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            service.exchange, codec.parse_request
        )
        training = TrainingService(host, service, train)
        server.add_generic_rpc_handlers((handlers("Host", service, Exchange=exchange), handlers("Training", training)))
        bound = open_port(server, f"{bind}:{port}", tls)
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
