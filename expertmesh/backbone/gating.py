"""Another gate in the place of a checkpoint's: for every token, or for the rows of one request.

All architectures with transformers' experts interface have the gate beside the experts, and it returns its logits
before anything else. So the logits are noted as they pass, and what reaches the experts' function is replaced by what
another gate makes of them. Knows nothing of requests, hosts or batches. Invariant: without another gate the model
computes what it always did, at the same cost; and a token's choices depend on its own row's gate only.

Shapes: T tokens, E experts of the layer, K choices of a token, H hidden.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.errors import ConfigError
from expertmesh.families.decorated import is_decorated
from expertmesh.gates.choices import NO_EXPERT, Choices
from expertmesh.gates.route import GateInput, route

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from expertmesh.backbone.backbone import Backbone
    from expertmesh.backbone.experts import MoeLayerFn
    from expertmesh.gates.spec import GateSpec

_log = logging.getLogger(__name__)

_NAMES = ("gate", "router")
_BIASES = ("e_score_correction_bias", "expert_bias")
"""What models call the bias that only selects."""
_PROBE = 3
"""Tokens of the forward that shows how a model's gates speak. Not one, nor a likely number of experts."""


class Gates:
    """The gates of a backbone's layers. One forward at a time, as the model itself."""

    def __init__(self, backbone: Backbone, default: GateSpec | None = None) -> None:
        """Runs the model once, on a few tokens and without its experts, so it must not be in use.

        `default` is for every row that is given no other gate; None is the checkpoint's own. Raises ConfigError where
        it does not fit the model.
        """
        self._default = default
        self._layers, obstacle = _find(backbone)
        self.obstacle = obstacle
        """Why this model can have no gate but its own; None if it can."""
        if default is not None:
            self.check(default)
            if not default.is_alone:
                _log.warning("%s: answers differ from batch to batch", default.why_not_alone)
            for layer in self._layers:
                layer.stand_in([(default, None)])

    def check(self, spec: GateSpec) -> None:
        """Raise ConfigError if not every layer can use this gate."""
        if self.obstacle is not None:
            raise ConfigError(f"gate.strategy cannot be {spec.strategy}: {self.obstacle}; leave gate out")
        for layer in self._layers:
            layer.check(spec)

    @contextmanager
    def by_row(self, rows: Sequence[tuple[GateSpec | None, int]]) -> Iterator[None]:
        """For one forward: which gate so many rows use, in the order of its tokens. None is the default."""
        resting: list[_Part] = [] if self._default is None else [(self._default, None)]
        parts = _parts([(spec or self._default, count) for spec, count in rows])
        for layer in self._layers:
            layer.stand_in(parts)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.stand_in(resting)


_Part = tuple["GateSpec | None", torch.Tensor | None]
"""A gate, None for the checkpoint's, and the rows that use it, None for all."""


class _LayerGate:
    """One layer's gate, and those that stand in for it."""

    def __init__(self, number: int, block: Any, gate: Any, experts: Any) -> None:
        self._number = number
        self._gate = gate
        self._experts = experts
        self._bias_E = _selection_bias(block, gate, experts.num_experts)
        self._parts: Sequence[_Part] = ()
        self._hook: Any = None
        self.logits: torch.Tensor | None = None
        """What the gate said last, until its experts have been chosen."""

    def obstacle(self, logits: torch.Tensor | None) -> str | None:
        """What keeps another gate from using what this one said of `_PROBE` tokens."""
        num_experts = self._experts.num_experts
        if logits is None:
            return f"the gate of MoE layer {self._number} says no logits"
        if logits.numel() != _PROBE * num_experts or logits.shape[-1] != num_experts:
            width = logits.shape[-1]
            return f"the gate of MoE layer {self._number} says {width} numbers of a token for {num_experts} experts"
        sums_T = logits.reshape(_PROBE, num_experts).float().sum(dim=-1)
        if logits.min() >= 0 and (sums_T - 1).abs().max() < 0.02:
            return f"the gate of MoE layer {self._number} says probabilities, not logits"
        return None

    def check(self, spec: GateSpec) -> None:
        """Raise ConfigError if this layer cannot use `spec`."""
        try:
            device = self._bias_E.device if self._bias_E is not None else "cpu"
            self._choose(spec, torch.zeros(1, self._experts.num_experts, device=device))
        except ConfigError as error:
            raise ConfigError(f"{error} (MoE layer {self._number} of this model)") from error

    def listen(self) -> None:
        if self._hook is None:
            self._hook = self._gate.register_forward_hook(self._note)

    def leave(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self.logits = self._experts.mesh_gate = None

    def stand_in(self, parts: Sequence[_Part]) -> None:
        """Have these gates choose from now on; without any, the checkpoint's does, and nothing listens to it."""
        self._parts = parts
        if parts:
            self.listen()
            self._experts.mesh_gate = self
        else:
            self.leave()

    def __call__(self, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes to the experts in place of the checkpoint's choices: index_TK and weights_TK, of any K."""
        assert self.logits is not None, "the experts were called without their gate"
        logits_TE, self.logits = self.logits.reshape(len(index_TK), -1), None
        chosen = []
        for spec, rows in self._parts:
            if spec is None:
                own = Choices(index_TK=index_TK, weights_TK=weights_TK)
                chosen.append(own if rows is None else Choices(index_TK=index_TK[rows], weights_TK=weights_TK[rows]))
            else:
                chosen.append(self._choose(spec, logits_TE if rows is None else logits_TE[rows]).trimmed())
        if len(chosen) == 1:
            return chosen[0].index_TK, chosen[0].weights_TK
        width = max(part.index_TK.shape[1] for part in chosen)
        index = index_TK.new_full((len(index_TK), width), NO_EXPERT)
        weights = torch.zeros((len(index_TK), width), dtype=torch.float32, device=index_TK.device)
        for (_, rows), part in zip(self._parts, chosen, strict=True):
            index[rows, : part.index_TK.shape[1]] = part.index_TK
            weights[rows, : part.index_TK.shape[1]] = part.weights_TK.float()
        return index, weights

    def _choose(self, spec: GateSpec, logits_TE: torch.Tensor) -> Choices:
        return route(spec, GateInput(logits_TE=logits_TE, bias_E=self._bias_E))

    def _note(self, module: Any, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        self.logits = first if isinstance(first, torch.Tensor) and first.is_floating_point() else None


def _parts(rows: Sequence[tuple[GateSpec | None, int]]) -> list[_Part]:
    """Which rows each gate has, the checkpoint's among them; nothing where that has all."""
    spans: dict[GateSpec | None, list[torch.Tensor]] = {}
    start = 0
    for spec, count in rows:
        spans.setdefault(spec, []).append(torch.arange(start, start + count))
        start += count
    if len(spans) == 1:
        (spec,) = spans
        return [] if spec is None else [(spec, None)]
    return [(spec, torch.cat(of)) for spec, of in spans.items()]


def _find(backbone: Backbone) -> tuple[tuple[_LayerGate, ...], str | None]:
    """The gates of the layers that a text reaches (those of a vision tower keep their own), and why there can be no
    other; None if there can."""
    parents = {id(child): module for module in backbone.model.modules() for child in module.children()}
    layers = []
    for number, experts in enumerate(backbone.moe_modules):
        if not is_decorated(experts):
            return (), f"MoE layer {number} of this model does not use transformers' experts interface"
        block = parents[id(experts)]
        gate = next((child for name in _NAMES if (child := getattr(block, name, None)) is not None), None)
        if not isinstance(gate, torch.nn.Module):
            return (), f"MoE layer {number} of this model has no gate beside its experts"
        layers.append(_LayerGate(number, block, gate, experts))
    heard = _hear(backbone, layers)
    for number, logits in heard.items():
        if (obstacle := layers[number].obstacle(logits)) is not None:
            return (), obstacle
    return tuple(layers[number] for number in sorted(heard)), None


def _hear(backbone: Backbone, layers: Sequence[_LayerGate]) -> dict[int, torch.Tensor | None]:
    """By layer, what its gate said of `_PROBE` tokens before the experts were called; None for nothing."""
    heard: dict[int, torch.Tensor | None] = {}

    def listener(layer: _LayerGate, number: int) -> MoeLayerFn:
        def hear(x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
            heard[number] = layer.logits
            return torch.zeros_like(x_TH)

        return hear

    connected = [module.mesh_layer for module in backbone.moe_modules]
    backbone.connect([listener(layer, number) for number, layer in enumerate(layers)])
    for layer in layers:
        layer.listen()
    try:
        with torch.no_grad():
            backbone.model(input_ids=torch.arange(_PROBE, device=backbone.model.device)[None], use_cache=False)
    finally:
        for layer in layers:
            layer.leave()
        backbone.connect(connected)
    return heard


def _selection_bias(block: Any, gate: Any, num_experts: int) -> torch.Tensor | None:
    """The checkpoint's bias that selects and does not weigh, bias_E float32, where it has one."""
    for module in (gate, block):
        for name, tensor in (*module.named_buffers(), *module.named_parameters()):
            if name.rpartition(".")[2] in _BIASES and tensor.numel() == num_experts:
                bias_E: torch.Tensor = tensor.detach().reshape(-1).float()
                return bias_E
    return None
