"""The trainer's side of the host protocol: what a controller may order, and training. Values in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import TrainingStub
from expertmesh.errors import ProtocolError, ReplicaUnavailableError
from expertmesh.transport import training_codec
from expertmesh.transport.grpc_control import GrpcHostControl

if TYPE_CHECKING:
    import torch

    from expertmesh.optimizer import Optimizer
    from expertmesh.transport import LayerRequest


class GrpcTraining(GrpcHostControl):
    """Orders of one session to one host. Lives on one event loop.

    Every method may be called again when its answer was lost, and raises TrainingLostError when the host is not in the
    session, or not at the step.
    """

    @property
    def _training(self) -> TrainingStub:
        return TrainingStub(self._channel)

    async def begin(self, session: int, step: int, optimizer: Optimizer, *, timeout_s: float) -> int:
        """Train all that it holds from here on: how many experts that is. Raises ConfigError, OutOfSlotsError or
        CheckpointError."""
        message = pb.BeginRequest(session=session, step=step, optimizer=training_codec.encode_optimizer(optimizer))
        reply: pb.BeginReply = await self._ask(self._training.Begin(message, **self._options(timeout_s)))
        return reply.experts

    async def backward(
        self, session: int, step: int, part: int, request: LayerRequest, grad_PH: torch.Tensor, *, timeout_s: float
    ) -> torch.Tensor:
        """Add to the gradients: for each pair, the gradient by its row."""
        message = training_codec.encode_backward(session, step, part, request, grad_PH)
        reply = await self._ask(self._training.Backward(message, **self._options(timeout_s)))
        try:
            return training_codec.from_bytes(
                reply.grad_rows, len(request.pair_rows), request.rows.shape[1], request.dtype
            )
        except ProtocolError as error:
            raise ReplicaUnavailableError(self._host.id, str(error)) from error

    async def step(self, session: int, step: int, parts: int, learning_rate: float, *, timeout_s: float) -> None:
        """Take a step. `parts`: how many this host has had."""
        message = pb.StepRequest(session=session, step=step, parts=parts, learning_rate=learning_rate)
        await self._ask(self._training.Step(message, **self._options(timeout_s)))

    async def save(self, session: int, step: int, folder: str, *, timeout_s: float) -> list[str]:
        """Write its replicas: the files' names. Raises ConfigError or CheckpointError."""
        message = pb.SaveRequest(session=session, step=step, folder=folder)
        return list((await self._ask(self._training.Save(message, **self._options(timeout_s)))).files)

    def _options(self, timeout_s: float) -> dict[str, Any]:
        # It runs when it is named, or is lost: then that must be seen at once.
        return super()._options(timeout_s) | {"wait_for_ready": False}
