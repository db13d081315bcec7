"""What a gate returns: for each token, which experts it goes to and how much each of them counts.

Knows no strategy. The convention that every gate and every consumer keeps:

- `index_TK` int64 numbers experts from 0; NO_EXPERT (-1) says that this choice leads nowhere, because the token wanted
  fewer than K experts or because the expert had no room. It may stand in any column.
- `weights_TK` is float32 (float64 where the logits are), and exactly 0 where there is no expert. So a sum over K needs
  no mask, given that the row of no expert is finite.
- A row names no expert twice. A token with no expert at all gets nothing from the layer: only the residual carries it.
- K is a number of the strategy and never of the data. `Choices.trimmed` cuts what no token of a batch needs.

Shapes: T tokens, E experts of the layer, K choices of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NO_EXPERT = -1
"""The index of a choice that leads nowhere. Its weight is 0."""

_NEVER_ZERO = 1e-20
"""Added to sums that are divided by: keeps 0/0 away where every score underflows, and changes no other sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The experts of T tokens, by the convention above."""

    index_TK: torch.Tensor
    weights_TK: torch.Tensor

    @property
    def is_expert_TK(self) -> torch.Tensor:
        """Where a choice leads to an expert."""
        return self.index_TK != NO_EXPERT

    def trimmed(self) -> Choices:
        """The same choices, packed to the left in their order, without columns that no token uses; one stays.

        Dropped columns would only have added zeros, so the layer's output is the same. K now depends on the data.
        """
        is_none_TK = ~self.is_expert_TK
        order_TK = is_none_TK.to(torch.int8).argsort(dim=-1, stable=True)
        width = max(1, int((~is_none_TK).sum(dim=-1).max())) if len(is_none_TK) else 1
        order_TK = order_TK[:, :width]
        return Choices(index_TK=self.index_TK.gather(1, order_TK), weights_TK=self.weights_TK.gather(1, order_TK))

    def spread(self, num_experts: int) -> torch.Tensor:
        """The same as a matrix gates_TE: each expert's weight for each token, 0 where it is not chosen."""
        gates_TE = self.weights_TK.new_zeros(len(self.index_TK), num_experts)
        return gates_TE.scatter_add(1, self.index_TK.clamp(min=0), self.weights_TK)


def widen(logits_TE: torch.Tensor) -> torch.Tensor:
    """Logits in the precision that gates compute in: float32, or float64 if they are."""
    return logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))


def weigh(
    scores_TE: torch.Tensor,
    index_TK: torch.Tensor,
    *,
    normalize: bool = False,
    wanted_TK: torch.Tensor | None = None,
    scale: float = 1.0,
) -> Choices:
    """Give each choice the score of its expert as weight; with `normalize`, divided by the row's sum; times `scale`.

    `wanted_TK` takes that sum over other choices than `index_TK`: those before some were dropped for want of room, so
    that what is left keeps the weight that it had.
    """
    weights_TK = _scores_of(scores_TE, index_TK)
    if normalize:
        sums_TK = weights_TK if wanted_TK is None else _scores_of(scores_TE, wanted_TK)
        weights_TK = weights_TK / (sums_TK.sum(dim=-1, keepdim=True) + _NEVER_ZERO)
    return Choices(index_TK=index_TK, weights_TK=weights_TK * scale)


def mark(scores_TE: torch.Tensor, is_chosen_TE: torch.Tensor) -> torch.Tensor:
    """The marked experts of each token as index_TE, best score first, then NO_EXPERT."""
    index_TE = best_k(scores_TE.masked_fill(~is_chosen_TE, -torch.inf), scores_TE.shape[1])
    return index_TE.where(is_chosen_TE.gather(1, index_TE), NO_EXPERT)


def best_k(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
    """The experts with the k best scores, best first; of equal ones the lower index first, on every device.

    A stable sort, since `torch.topk` leaves the order of equal scores open, and with it which of them are chosen.
    """
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def count_tokens(index_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many tokens each expert gets: tokens_E, int64."""
    return torch.bincount(index_TK[index_TK != NO_EXPERT], minlength=num_experts)


def _scores_of(scores_TE: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    """The score of each choice, 0 for NO_EXPERT."""
    return scores_TE.gather(1, index_TK.clamp(min=0)).masked_fill(index_TK == NO_EXPERT, 0.0)
