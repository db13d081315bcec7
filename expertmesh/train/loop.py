"""The training loop.

Owns the optimiser, the learning rate and the order of steps. Does not know text, files or terminals: it takes batches
of tokens and yields what happened. Invariant: the learning rate is a function of the tokens seen and the
budget, so a run with a known budget can be repeated.

Shapes: B windows of a batch, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor
    from transformers import Qwen3MoeForCausalLM

    from expertmesh.train.balance import SteeredGates
    from expertmesh.train.budget import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """AdamW with a learning rate that warms up, stays, and decays to nothing (1 - sqrt, Hägele et al., 2024).

    Until the decay the rate does not depend on how long the run will be. So the budget may be decided late.
    """

    peak_rate: float = 3e-3
    warmup_tokens: int = 200_000
    decay_share: float = 0.35
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def rate(self, seen: int, budget: int | None) -> float:
        """Return the learning rate of the step that ends at `seen` tokens, of `budget` where it is known."""
        rate = self.peak_rate * min(seen / self.warmup_tokens, 1.0)
        if budget is None:
            return rate
        start = (1 - self.decay_share) * budget
        progress = min(max(seen - start, 0.0) / (budget - start), 1.0)
        return rate * (1 - math.sqrt(progress))

    def budget_to_decay_from(self, seen: int) -> int:
        """Return the budget whose decay starts right after `seen` tokens."""
        return math.ceil(seen / (1 - self.decay_share))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step, after it was taken.

    `tokens` were seen so far, of `budget` where it is known; losses are means over tokens, in nats.
    """

    number: int
    tokens: int
    budget: int | None
    loss: float
    penalty: float


def train(
    model: Qwen3MoeForCausalLM, batches_BT: Iterable[Tensor], schedule: Schedule, gates: SteeredGates, budget: Budget
) -> Iterator[Step]:
    """Train `model` in place, one step for each value taken, until the budget of tokens is spent.

    `gates` are the model's own, steered by the balance of the run.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    seen = 0
    for number, batch_BT in enumerate(batches_BT, start=1):
        tokens = budget.tokens(seen)
        if tokens is not None and seen >= tokens:
            return
        seen += batch_BT.numel()
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(seen, tokens)
        model.train()  # again for each step: between two of them the caller may have evaluated it
        outputs = model(input_ids=batch_BT, use_cache=False)
        loss = next_token_loss(outputs.logits, batch_BT)
        penalty = gates.penalty()
        optimiser.zero_grad()
        torch.autograd.backward(loss + penalty)
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        optimiser.step()
        gates.move_bias()
        yield Step(number=number, tokens=seen, budget=tokens, loss=loss.item(), penalty=penalty.item())


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of every token but the first given those before it."""
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())
