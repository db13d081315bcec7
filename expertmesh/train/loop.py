"""The training loop.

Owns the optimiser, the learning rate and the order of steps. Does not know text, files or terminals: it takes batches
of tokens and yields what happened. Invariant: the learning rate is a function of the tokens seen.

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

    from expertmesh.train.balance import Balance


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """AdamW with a linear warm-up and a cosine decay to nothing, over a budget of tokens."""

    tokens: int
    peak_rate: float = 3e-3
    warmup_share: float = 0.04
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def rate(self, seen: int) -> float:
        """Return the learning rate for the step that starts after `seen` tokens."""
        share = min(seen / self.tokens, 1.0)
        if share < self.warmup_share:
            return self.peak_rate * (share / self.warmup_share)
        progress = (share - self.warmup_share) / (1 - self.warmup_share)
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step, after it was taken. Losses are means over tokens, in nats."""

    number: int
    tokens: int
    loss: float
    penalty: float


def train(
    model: Qwen3MoeForCausalLM, batches_BT: Iterable[Tensor], schedule: Schedule, balance: Balance
) -> Iterator[Step]:
    """Train `model` in place, one step for each value taken, until the budget of tokens is spent."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    model.train()
    seen = 0
    for number, batch_BT in enumerate(batches_BT, start=1):
        if seen >= schedule.tokens:
            return
        seen += batch_BT.numel()
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(seen)
        outputs = model(input_ids=batch_BT, output_router_logits=True, use_cache=False)
        loss = next_token_loss(outputs.logits, batch_BT)
        penalty = balance.penalty(outputs.router_logits)
        optimiser.zero_grad()
        (loss + penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        optimiser.step()
        yield Step(number=number, tokens=seen, loss=loss.item(), penalty=penalty.item())


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of every token but the first given those before it."""
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())
