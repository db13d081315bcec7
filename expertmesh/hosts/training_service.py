"""The gRPC service Training of a host (protos/host.proto): checks what comes in, and hands it to the trained replicas.

Orders are carried out one after the other. Gradients and steps are computed on the event loop, as rows are: a launch
sees the weights before a step or after it. Invariant: nothing is written outside of the folder that the host was
started with.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import TrainingServicer
from expertmesh.checkpoint.trained import read_trained, write_trained
from expertmesh.errors import ConfigError, ProtocolError, TrainingLostError, one_line
from expertmesh.hosts.answering import answered
from expertmesh.hosts.training import TrainedReplicas, check_memory
from expertmesh.optimizer import check_learning_rate
from expertmesh.transport import training_codec
from expertmesh.transport.codec import RequestDecoder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from expertmesh.checkpoint.recipe import ExpertRecipe
    from expertmesh.checkpoint.trained import Trained
    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.hosts.host import Host
    from expertmesh.hosts.service import HostService
    from expertmesh.ids import ExpertId
    from expertmesh.optimizer import Optimizer

    Context = grpc.aio.ServicerContext[Any, Any]


class TrainingService(TrainingServicer):
    """Trains one host's replicas, on the host's event loop."""

    def __init__(self, host: Host, service: HostService, folder: Path | None) -> None:
        """`service` knows how replicas were read. `folder`: where to save; None: this host is not to be trained."""
        self._host = host
        self._service = service
        self._folder = folder
        self._replicas: TrainedReplicas | None = None
        self._decoder: RequestDecoder | None = None
        self._turn = asyncio.Lock()

    async def Begin(self, message: pb.BeginRequest, context: Context) -> pb.BeginReply:
        if self._folder is None:
            refusal = "this host was not started to be trained: start it with --train FOLDER"
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)

        async def begin() -> pb.BeginReply:
            if message.session == 0:
                raise ProtocolError("session: it must be above 0")
            optimizer = training_codec.decode_optimizer(message.optimizer)
            async with self._turn:
                if not self._is_in(message.session):
                    await self._begin(message.session, message.step, optimizer)
                assert self._replicas is not None
                return pb.BeginReply(experts=len(self._replicas))

        return await answered(begin, context)

    def _is_in(self, session: int) -> bool:
        replicas = self._replicas
        return (
            replicas is not None and replicas.session == session and replicas.configuration is self._host.configuration
        )

    async def _begin(self, session: int, step: int, optimizer: Optimizer) -> None:
        recipes, configuration = dict(self._service.recipes), self._host.configuration
        if self._replicas is not None and self._replicas.configuration is not configuration:
            self._replicas = None  # of no more use, and large
        check_memory(self._host, list(recipes), optimizer)
        assert configuration is not None
        assert self._service.root is not None
        root = self._service.root
        experts = await asyncio.to_thread(_read, root, recipes, configuration, step, optimizer)
        if self._host.configuration is not configuration or self._service.recipes != recipes:
            raise TrainingLostError("the host was given other replicas while it read")
        self._replicas = TrainedReplicas(self._host, session, step, optimizer, experts)
        self._decoder = RequestDecoder(configuration)

    async def Backward(self, message: pb.BackwardRequest, context: Context) -> pb.BackwardReply:
        async def backward() -> pb.BackwardReply:
            async with self._turn:
                replicas = self._current()
                replicas.check(message.session, message.step)
                assert self._decoder is not None
                request, grad_PH = training_codec.decode_backward(self._decoder, message)
                x_grad_PH = replicas.backward(message.part, request, grad_PH)
                return pb.BackwardReply(grad_rows=training_codec.to_bytes(x_grad_PH))

        return await answered(backward, context)

    async def Step(self, message: pb.StepRequest, context: Context) -> pb.StepReply:
        async def step() -> pb.StepReply:
            try:
                rate = check_learning_rate(message.learning_rate)
            except ConfigError as error:
                raise ProtocolError(str(error)) from error
            async with self._turn:
                replicas = self._current()
                if not replicas.has_taken(message.session, message.step, message.parts):
                    self._replicas = None  # should it fail half way, nobody must take the rest for whole
                    replicas.take_step(rate)
                    self._replicas = replicas
                return pb.StepReply(step=replicas.step)

        return await answered(step, context)

    async def Save(self, message: pb.SaveRequest, context: Context) -> pb.SaveReply:
        async def save() -> pb.SaveReply:
            async with self._turn:
                replicas = self._current()
                replicas.check(message.session, message.step)
                folder = await asyncio.to_thread(self._checked, message.folder)
                return pb.SaveReply(files=await asyncio.to_thread(_write, folder, replicas))

        return await answered(save, context)

    def _current(self) -> TrainedReplicas:
        if self._replicas is None:
            raise TrainingLostError("the host is in no session of training")
        return self._replicas

    def _checked(self, name: str) -> Path:
        """The folder of that name, if it is one to save in. Raises ConfigError."""
        assert self._folder is not None
        allowed = self._folder.resolve()
        if not name.isprintable() or not os.path.isabs(name) or not os.path.isdir(name):
            raise ConfigError(f"folder: on this host there is no folder {one_line(name)!r}; give the full path of one")
        folder = Path(name).resolve()
        if not folder.is_relative_to(allowed):
            raise ConfigError(f"folder: {one_line(name)!r} is not in {allowed}, where this host was started to save")
        return folder


def _read(
    root: Path, recipes: Mapping[ExpertId, ExpertRecipe], asked: HostConfiguration, step: int, optimizer: Optimizer
) -> dict[ExpertId, Trained]:
    return {
        expert: read_trained(root, recipe, asked.spec(expert.layer), step, optimizer)
        for expert, recipe in sorted(recipes.items())
    }


def _write(folder: Path, replicas: TrainedReplicas) -> list[str]:
    return [write_trained(folder, expert, replicas.step, replicas.tensors(expert)) for expert in replicas.experts]
