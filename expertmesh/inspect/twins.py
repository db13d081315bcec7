"""Experts of a layer that hardly differ in what they get, so that one of them might be enough.

Two experts may fire together, for the same tokens at the same places, or be alike: prefer the same tokens, though not
at once. Either makes them twins. What the experts do to a token is not looked at.

Shapes: T tokens of all domains, E experts, V the different tokens that occur.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from expertmesh.gates.choices import Choices
    from expertmesh.inspect.typical import TokenCounts

TOGETHER = 0.5
"""Twins by firing together: of the tokens that either gets, both get this share or more."""

ALIKE = 0.9
"""Twins by being alike: their preferences correlate so or more."""

_LEAST_TOKENS = 30
"""An expert with fewer tokens is not compared."""

_LEAST_OCCURRENCES = 5
"""A token that occurs less often says nothing of preferences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two experts of a layer, compared."""

    experts: tuple[int, int]
    together: float
    """Of the tokens that either gets, the share that both get: 0 to 1."""
    alike: float
    """The correlation of how large a share of each token the two get, over tokens weighted by frequency: -1 to 1."""

    @property
    def is_twin(self) -> bool:
        return self.closeness >= 1

    @property
    def closeness(self) -> float:
        """1 or more for twins."""
        return max(self.together / TOGETHER, self.alike / ALIKE)


def closest_pairs(choices: Choices, counts: TokenCounts) -> tuple[Pair, ...]:
    """The layer's twins, and if there are none the pair that comes closest; closest first."""
    num_experts = len(counts.tokens_EV)
    tokens_E = counts.tokens_EV.sum(dim=1)
    chosen_TE = (choices.spread(num_experts) != 0).double()
    both_EE = chosen_TE.T @ chosen_TE
    either_EE = tokens_E.unsqueeze(1) + tokens_E - both_EE
    together_EE = both_EE / either_EE.clamp(min=1)
    alike_EE = _correlate(counts)
    is_compared_E = tokens_E >= _LEAST_TOKENS
    is_pair_EE = (is_compared_E.unsqueeze(1) & is_compared_E).triu(diagonal=1)
    closeness_EE = torch.maximum(together_EE / TOGETHER, alike_EE / ALIKE).masked_fill(~is_pair_EE, -torch.inf)
    is_told_EE = is_pair_EE & (closeness_EE >= closeness_EE.max().clamp(max=1.0))
    pairs = [
        Pair(experts=(one, other), together=float(together_EE[one, other]), alike=float(alike_EE[one, other]))
        for one, other in is_told_EE.nonzero().tolist()
    ]
    return tuple(sorted(pairs, key=lambda pair: (-pair.closeness, pair.experts)))


def _correlate(counts: TokenCounts) -> torch.Tensor:
    """Of the shares of each token that two experts get, the correlation over tokens by frequency: [E, E]."""
    is_told_V = counts.occurrences_V >= _LEAST_OCCURRENCES
    occurrences_V, tokens_EV = counts.occurrences_V[is_told_V], counts.tokens_EV[:, is_told_V]
    base_E1 = tokens_EV.sum(dim=1, keepdim=True) / occurrences_V.sum().clamp(min=1)
    # Weighted by occurrences n, the covariance of shares c/n is the sum of (c - n b)(c' - n b')/n.
    scaled_EV = (tokens_EV - occurrences_V * base_E1) / occurrences_V.sqrt()
    length_E1 = scaled_EV.norm(dim=1, keepdim=True).clamp(min=1e-12)
    unit_EV = scaled_EV / length_E1
    alike_EE: torch.Tensor = unit_EV @ unit_EV.T
    return alike_EE
