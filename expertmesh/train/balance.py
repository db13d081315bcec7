"""What keeps every expert in use while the gates are learned.

Owns the pressure towards even load, and nothing else of the training. Invariant: the load is judged over a whole mixed
batch, layer by layer. An expert may serve one domain alone, but may not stay idle.

Shapes: N tokens of a batch, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Balance(Protocol):
    """A way to balance the experts' load in training."""

    def penalty(self, logits_NE: Sequence[Tensor]) -> Tensor:
        """Return what to add to the loss of a batch, given every layer's gate logits."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxiliaryLoss:
    """The auxiliary loss of Switch Transformers (Fedus et al., 2021, equation 4), for top-k, averaged over layers.

    A layer's term is 1 for even load and `num_experts` when one expert takes everything. transformers' own version
    sums the layers' loads first, and so lets an expert die in one layer if its namesake in another is busy.
    """

    coefficient: float
    top_k: int

    def penalty(self, logits_NE: Sequence[Tensor]) -> Tensor:
        terms = []
        for layer_NE in logits_NE:
            num_experts = layer_NE.shape[-1]
            chosen_NK = layer_NE.topk(self.top_k, dim=-1).indices
            load_E = torch.bincount(chosen_NK.flatten(), minlength=num_experts) / chosen_NK.numel()
            probability_E = layer_NE.softmax(dim=-1).mean(dim=0)
            terms.append(num_experts * (load_E * probability_E).sum())
        return self.coefficient * torch.stack(terms).mean()
