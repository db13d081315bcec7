"""The trained replicas of a host: float32 weights, their gradients, and the optimiser that moves them. Knows no gRPC.

The host's kernels go on computing the forward pass; after every step they get the new weights. A gradient is summed
part by part, in the parts' order, and each part's is computed expert by expert over that expert's rows alone. So its
bits do not depend on which experts share a host.

Its invariant: a part counts once, and a step is taken once, however often they are asked for.

Shapes: P pairs, R rows of one expert, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from expertmesh.errors import ConfigError, OutOfSlotsError, ProtocolError, TrainingLostError
from expertmesh.ids import ExpertId
from expertmesh.kernels.differentiable import expert_ffn
from expertmesh.kernels.spec import ExpertWeights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from expertmesh.checkpoint.trained import Trained
    from expertmesh.hosts.host import Host
    from expertmesh.kernels.spec import ExpertSpec
    from expertmesh.optimizer import Optimizer
    from expertmesh.transport import LayerRequest


class _Replica(NamedTuple):
    spec: ExpertSpec
    weights: ExpertWeights
    """Float32, on the host's device."""
    optimizer: torch.optim.Optimizer

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.weights._asdict().items() if tensor is not None}


def check_memory(host: Host, experts: Sequence[ExpertId], optimizer: Optimizer) -> None:
    """Raise ConfigError when there is nothing to train, OutOfSlotsError when it takes more memory than the host has."""
    configuration = host.configuration
    if configuration is None or not experts:
        raise ConfigError("the host holds no replica to train: load some first")
    specs = [configuration.spec(expert.layer) for expert in experts]
    needed = sum(host.bytes_per_slot(spec) + 4 * optimizer.num_copies * spec.num_parameters for spec in specs)
    if needed > host.memory_bytes:
        raise OutOfSlotsError(
            f"to train {len(experts)} experts with {optimizer.name} takes {needed:,} bytes, and the host has "
            f"{host.memory_bytes:,}: use more hosts, or give them more memory"
        )


class TrainedReplicas:
    """One session of training, from its beginning until the host is configured anew. Used by the host's one thread."""

    def __init__(
        self, host: Host, session: int, step: int, optimizer: Optimizer, experts: Mapping[ExpertId, Trained]
    ) -> None:
        """Train `experts`, which the host holds with the same weights. `step`: how many steps they have behind them."""
        assert host.configuration is not None
        self.session = session
        self.configuration = host.configuration
        self.step = step
        self._first_step = step
        self._parts = 0
        """Added to the gradients since the last step."""
        self._host = host
        self._replicas = {
            expert: _replica(host.configuration.spec(expert.layer), trained, optimizer, host.device)
            for expert, trained in experts.items()
        }

    def __len__(self) -> int:
        return len(self._replicas)

    def check(self, session: int, step: int) -> None:
        """Raise TrainingLostError unless the host is in that session, at that step, with all that it trained."""
        if session != self.session or self._host.configuration is not self.configuration:
            raise TrainingLostError("the host is not in this session of training (any more)")
        if step != self.step:
            raise TrainingLostError(f"the host is at step {self.step}, not {step}")
        if not all(self._host.holds(expert) for expert in self._replicas):
            raise TrainingLostError("a replica that is trained was dropped")

    def backward(self, part: int, request: LayerRequest, grad_PH: Tensor) -> Tensor:
        """Add a part to the gradients: for each pair, the gradient by its row, in the request's dtype.

        grad_PH is the loss's gradient by each result row of `request`. Raises TrainingLostError when parts before this
        one are missing, ProtocolError when an expert is not trained here.
        """
        if part > self._parts:
            raise TrainingLostError(f"part {part} of the gradients came, but not part {self._parts}")
        experts = [ExpertId(request.layer, index) for index in request.experts]
        for expert in experts:
            if expert not in self._replicas:
                raise ProtocolError(f"expert {expert} is not trained here")
        x_TH = torch.from_numpy(request.rows.copy()).view(grad_PH.dtype)
        x_PH = x_TH[torch.from_numpy(request.pair_rows)]
        found = [
            self._differentiate(self._replicas[expert], x_RH, grad_RH)
            for expert, x_RH, grad_RH in zip(
                experts, torch.split(x_PH, request.counts), torch.split(grad_PH, request.counts), strict=True
            )
        ]
        if part == self._parts:
            self._parts += 1
            for expert, (_, grads) in zip(experts, found, strict=True):
                for tensor, grad in zip(self._replicas[expert].tensors.values(), grads, strict=True):
                    tensor.grad = grad if tensor.grad is None else tensor.grad.add_(grad)
        return torch.cat([x_grad_RH for x_grad_RH, _ in found])

    def _differentiate(self, replica: _Replica, x_RH: Tensor, grad_RH: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The gradient by the rows, and by each tensor of the weights, as the kernel has them: rounded to its dtype."""
        dtype = getattr(torch, replica.spec.dtype)
        x = x_RH.to(self._host.device, torch.float32).requires_grad_()
        rounded = {name: tensor.detach().to(dtype).float().requires_grad_() for name, tensor in replica.tensors.items()}
        with torch.enable_grad():
            y_RH = expert_ffn(replica.spec, ExpertWeights(**rounded), x)
        x_grad_RH, *grads = torch.autograd.grad(y_RH, [x, *rounded.values()], grad_RH.to(y_RH.device, torch.float32))
        return x_grad_RH.to(x_RH.device, x_RH.dtype), grads

    def has_taken(self, session: int, step: int, parts: int) -> bool:
        """Whether this step was taken already, and only its answer lost. Raises TrainingLostError when it cannot be."""
        if step == self.step - 1 and step >= self._first_step:
            self.check(session, self.step)
            return True
        self.check(session, step)
        if parts != self._parts:
            raise TrainingLostError(f"the host has {self._parts} parts of the gradients, not {parts}")
        return False

    def take_step(self, learning_rate: float) -> None:
        """Move every expert that has a gradient, and give the kernels its new weights."""
        for expert, replica in self._replicas.items():
            if replica.weights.w_in.grad is None:
                continue
            for group in replica.optimizer.param_groups:
                group["lr"] = learning_rate
            replica.optimizer.step()
            replica.optimizer.zero_grad()
            dtype = getattr(torch, replica.spec.dtype)
            copies = {name: tensor.detach().to("cpu", dtype, copy=True) for name, tensor in replica.tensors.items()}
            self._host.write(expert, ExpertWeights(**copies))
        self.step += 1
        self._parts = 0

    def tensors(self, expert: ExpertId) -> dict[str, Tensor]:
        """What to keep of a replica: its weights by their names, and `STATE.WEIGHT` of the optimiser's state."""
        replica = self._replicas[expert]
        found = {name: tensor.detach() for name, tensor in replica.tensors.items()}
        for name, tensor in replica.tensors.items():
            kept: dict[str, Any] = replica.optimizer.state.get(tensor, {})
            found |= {f"{key}.{name}": value for key, value in kept.items() if isinstance(value, torch.Tensor)}
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    @property
    def experts(self) -> tuple[ExpertId, ...]:
        """Those that are trained."""
        return tuple(self._replicas)


def _replica(spec: ExpertSpec, trained: Trained, optimizer: Optimizer, device: str) -> _Replica:
    given = {name: tensor for name, tensor in trained.weights._asdict().items() if tensor is not None}
    tensors = {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in given.items()}
    made = _optimizer(optimizer, list(tensors.values()))
    for name, state in trained.state.items():
        tensor = tensors[name]
        # As torch.optim keeps it: AdamW's count of steps stays on the CPU.
        made.state[tensor] = {key: value if key == "step" else value.to(device) for key, value in state.items()}
    return _Replica(spec, ExpertWeights(**tensors), made)


def _optimizer(of: Optimizer, tensors: list[Tensor]) -> torch.optim.Optimizer:
    """One for each expert: it moves those that got rows in a step, and leaves all about the others as it is."""
    if of.name == "sgd":
        return torch.optim.SGD(tensors, lr=0.0, momentum=of.momentum, weight_decay=of.weight_decay)
    betas = (of.beta1, of.beta2)
    return torch.optim.AdamW(tensors, lr=0.0, betas=betas, eps=of.epsilon, weight_decay=of.weight_decay)
