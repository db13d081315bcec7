"""What keeps every expert in use while the gates are learned.

Owns which pressures there are, and how they reach the gates of a transformers model: by hooks, so that the model stays
what it is. Every gate, loss and bias update is of `expertmesh.gates`; nothing of the kind is computed here. Invariant:
load is judged layer by layer, over a whole mixed batch. An expert may serve one domain alone, but may not stay idle.

Shapes: L MoE layers, T tokens of a batch, E experts, K choices of a token.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.errors import check_known
from expertmesh.gates.balancing import switch_loss, update_bias, z_loss
from expertmesh.gates.choices import NO_EXPERT, Choices, count_tokens
from expertmesh.gates.route import GateInput, route
from expertmesh.gates.select import softmax
from expertmesh.gates.spec import GateSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """The pressures of one run, each absent where its field is left at nothing. Losses are averaged over layers."""

    aux: float = 0.0
    """Coefficient of the auxiliary loss of Switch Transformers."""
    z: float = 0.0
    """Coefficient of the router z-loss of ST-MoE."""
    bias_rate: float = 0.0
    """By how much a step moves each expert's selection bias (loss-free balancing)."""
    experts_choose: bool = False
    """In training, experts choose tokens: as many choices as tokens would have, evenly divided."""


BALANCES = {
    "none": Balance(),
    "aux": Balance(aux=0.02),
    "aux+z": Balance(aux=0.02, z=0.001),
    "bias": Balance(bias_rate=0.002),
    "expert-choice": Balance(experts_choose=True),
}
"""By the name on the command line."""


def balance_named(name: str) -> Balance:
    """Look it up. Raises ConfigError for a name that is not there."""
    check_known("balance", name, BALANCES)
    return BALANCES[name]


def fitted(config: Qwen3MoeConfig, balance: Balance) -> Qwen3MoeConfig:
    """The config with the weights that a balance trains: where experts choose, probabilities as they are."""
    fitting = copy.deepcopy(config)
    fitting.norm_topk_prob = config.norm_topk_prob and not balance.experts_choose
    return fitting


class SteeredGates:
    """The gates of one model between `steer` and its end.

    While the model is in training mode they choose as the balance says; in evaluation mode as they can be served: each
    token its own best experts, with the bias where there is one. Everything asked is of the model's last forward pass.
    """

    def __init__(self, model: Qwen3MoeForCausalLM, balance: Balance) -> None:
        config = model.config
        num_experts, k = config.num_experts, config.num_experts_per_tok
        self.modules: list[nn.Module] = [layer.mlp.gate for layer in model.model.layers]
        self.bias_LE = torch.zeros(len(self.modules), num_experts)
        self._balance = balance
        self._served = GateSpec(strategy="softmax-topk", num_experts=num_experts, k=k, normalize=config.norm_topk_prob)
        self._trained = self._served
        if balance.experts_choose:
            self._trained = GateSpec(strategy="expert-choice", num_experts=num_experts, capacity_factor=k)
        self._last: dict[int, tuple[Tensor, Choices]] = {}

    def choose(self, layer: int, gate: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Any, ...]:
        """Replace what transformers' gate of a layer has chosen; a forward hook of that gate."""
        logits_TE = output[0]
        spec = self._trained if gate.training else self._served
        bias_E = self.bias_LE[layer] if self._balance.bias_rate else None
        choices = route(spec, GateInput(logits_TE=logits_TE, bias_E=bias_E))
        if gate.training and self._balance.experts_choose:
            choices = choices.trimmed()  # E columns are made for a token that all experts choose, and none is
        self._last[layer] = logits_TE, choices
        # transformers' experts know a choice that leads nowhere as one past the last expert.
        index_TK = choices.index_TK.masked_fill(choices.index_TK == NO_EXPERT, logits_TE.shape[1])
        return logits_TE, choices.weights_TK, index_TK

    def tokens_LE(self) -> Tensor:
        """How many tokens each expert got, int64."""
        return torch.stack([count_tokens(choices.index_TK, logits.shape[1]) for logits, choices in self._in_order()])

    def penalty(self) -> Tensor:
        """What the balance adds to the loss: a scalar, through which gradients reach the gates."""
        terms = []
        for logits_TE, choices in self._in_order():
            term = logits_TE.new_zeros(())
            if self._balance.aux:
                term = term + self._balance.aux * switch_loss(softmax(logits_TE), choices.index_TK)
            if self._balance.z:
                term = term + self._balance.z * z_loss(logits_TE)
            terms.append(term)
        return torch.stack(terms).mean()

    def move_bias(self) -> None:
        """Move the selection bias towards the experts that got less than the mean, where the balance has one."""
        if self._balance.bias_rate:
            moved = [
                update_bias(bias_E, tokens_E, self._balance.bias_rate)
                for bias_E, tokens_E in zip(self.bias_LE, self.tokens_LE(), strict=True)
            ]
            self.bias_LE = torch.stack(moved)

    def _in_order(self) -> list[tuple[Tensor, Choices]]:
        return [self._last[layer] for layer in range(len(self.modules))]


@contextlib.contextmanager
def steer(model: Qwen3MoeForCausalLM, balance: Balance) -> Iterator[SteeredGates]:
    """Have a balance choose for the gates of `model`; afterwards they choose by themselves again."""
    gates = SteeredGates(model, balance)
    if balance.experts_choose:
        # The faster ways to run experts take no choice that leads nowhere.
        model.set_experts_implementation("eager")
    with contextlib.ExitStack() as hooks:
        for layer, module in enumerate(gates.modules):
            hooks.callback(module.register_forward_hook(partial(gates.choose, layer)).remove)
        yield gates
