"""`MoELayer`: a torch module whose experts are elsewhere. The gate, and the weighted sum, are here, and learn as ever.

Knows neither hosts nor how experts are trained. Invariant: products and sums are taken in the gate's order, in float32,
so that the answer depends on nothing but x, the gate's weights and the experts'.

Shapes: T tokens, E experts of the layer, K choices of a token, P choices that lead to an expert, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from expertmesh.errors import ConfigError
from expertmesh.gates.route import GateInput, route
from expertmesh.gates.strategies import STRATEGIES
from expertmesh.layers.experts import ServedExperts
from expertmesh.moe.layer import combine

if TYPE_CHECKING:
    from expertmesh.gates.choices import Choices
    from expertmesh.gates.spec import GateSpec
    from expertmesh.layers.experts import Experts


class MoELayer(nn.Module):
    """x (..., H) -> y (..., H), in x's dtype and on its device.

    Its parameters are the gate's alone; those of the experts are `experts`'.
    """

    def __init__(
        self,
        experts: Experts | str,
        gate: GateSpec,
        *,
        layer: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        """`experts`: served ones by the address of their mesh's gateway, or any others. `layer`: which of their layers.
        `generator`: for gates that draw, while the module trains; without one they do not.

        Raises ConfigError when the gate and the experts do not fit.
        """
        super().__init__()
        of: Experts = ServedExperts(experts) if isinstance(experts, str) else experts
        layers = len(of.num_experts)
        if not 0 <= layer < layers:
            raise ConfigError(f"layer: there is no layer {layer}; the experts are of layers 0 to {layers - 1}")
        if gate.num_experts != (num_experts := of.num_experts[layer]):
            raise ConfigError(
                f"gate.num_experts is {gate.num_experts}, but layer {layer} has {num_experts}: use {num_experts}"
            )
        inputs = STRATEGIES[gate.strategy].inputs
        if "token_T" in inputs:
            raise ConfigError(
                f"gate.strategy {gate.strategy} needs token ids, which rows have not: use another strategy"
            )
        self.experts = of
        self.gate = nn.Linear(of.hidden, gate.num_experts, bias=False)
        self.noise = nn.Linear(of.hidden, gate.num_experts, bias=False) if "noise_TE" in inputs else None
        self.logits_TE: torch.Tensor | None = None
        """Of the last call, as `choices`: what balancing losses are made from (`gates.balancing`)."""
        self.choices: Choices | None = None
        self._spec = gate
        self._layer = layer
        self._generator = generator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raises ConfigError for rows of another width; all else is the experts' to raise."""
        if x.shape[-1] != self.experts.hidden:
            raise ConfigError(f"x has rows of {x.shape[-1]} numbers, and the experts take {self.experts.hidden}")
        x_TH = x.reshape(-1, x.shape[-1])
        self.logits_TE = self.gate(x_TH)
        noise_TE = None if self.noise is None else self.noise(x_TH)
        given = GateInput(logits_TE=self.logits_TE, noise_TE=noise_TE)
        choices = self.choices = route(self._spec, given, generator=self._generator if self.training else None)
        rows_TKH = self._rows(x_TH.to(self.experts.dtype), choices)
        return combine(rows_TKH, choices.weights_TK).to(x.dtype).view(x.shape)

    def _rows(self, x_TH: torch.Tensor, choices: Choices) -> torch.Tensor:
        """Zeros where a choice leads nowhere."""
        is_expert_TK = choices.is_expert_TK
        if is_expert_TK.all():
            return self.experts.rows(self._layer, x_TH, choices.index_TK)
        token_P = is_expert_TK.nonzero()[:, 0]
        rows_P1H = self.experts.rows(self._layer, x_TH[token_P], choices.index_TK[is_expert_TK].unsqueeze(1))
        rows_TKH = x_TH.new_zeros(*is_expert_TK.shape, x_TH.shape[1])
        return rows_TKH.index_put((is_expert_TK,), rows_P1H[:, 0])
