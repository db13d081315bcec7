"""The tokens that an expert gets more often than its load would have it, each with a place in the text.

Invariant: the same readings give the same tokens in the same order.

Shapes: T tokens of all domains, K choices of a token, C all choices, N those of one expert, E experts, V the different
tokens that occur.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from expertmesh.gates.choices import NO_EXPERT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertmesh.inspect.watch import Reading
    from expertmesh.serve.text import TextCodec

SHOWN = 6
"""Tokens told of each expert."""

PRIOR = 5.0
"""A token is ranked as if it had occurred so often more, at the base rate: 199 of 200 comes before 3 of 3."""

LEAST = 3
"""An expert got a token that often, or it is not told."""

_AROUND = 10
"""Tokens of context on each side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TypicalToken:
    """A token, how often an expert gets it, and the occurrence that weighs most for the expert."""

    token: str
    token_id: int
    lift: float
    """How many times as often the expert gets this token as it gets any: (count / occurrences) / base rate."""
    count: int
    occurrences: int
    domain: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """How often each token occurs, and how often each expert of a layer gets it."""

    token_V: torch.Tensor
    """Token ids, ascending."""
    occurrences_V: torch.Tensor
    tokens_EV: torch.Tensor
    """float64, all counts exact."""

    @property
    def base_rate_E1(self) -> torch.Tensor:
        """The share of all tokens that each expert gets."""
        return self.tokens_EV.sum(dim=1, keepdim=True) / self.occurrences_V.sum()


def count_by_token(ids_T: torch.Tensor, index_TK: torch.Tensor, num_experts: int) -> TokenCounts:
    """Count one layer's choices by token."""
    token_V = torch.tensor(sorted(set(ids_T.tolist())))
    place_T = torch.searchsorted(token_V, ids_T)
    cell_TK = index_TK * len(token_V) + place_T.unsqueeze(1)
    cells = torch.bincount(cell_TK[index_TK != NO_EXPERT], minlength=num_experts * len(token_V))
    return TokenCounts(
        token_V=token_V,
        occurrences_V=torch.bincount(place_T).double(),
        tokens_EV=cells.view(num_experts, len(token_V)).double(),
    )


def typical_tokens(
    counts: TokenCounts, readings: Sequence[Reading], layer: int, codec: TextCodec
) -> list[tuple[TypicalToken, ...]]:
    """For each expert of the layer the tokens with the highest lift above 1, the most typical first."""
    lift_EV = counts.tokens_EV / counts.occurrences_V / counts.base_rate_E1
    ids_T = torch.cat([reading.ids_T for reading in readings])
    index_TK = torch.cat([reading.layers[layer].index_TK for reading in readings])
    weights_TK = torch.cat([reading.layers[layer].weights_TK for reading in readings])
    share_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).tiny)
    # Choices sorted by expert, those that lead nowhere first: so each expert's are found once for all.
    choice_C = index_TK.flatten().argsort(stable=True)
    sizes = [int((index_TK == NO_EXPERT).sum()), *counts.tokens_EV.sum(dim=1).long().tolist()]
    experts: list[tuple[TypicalToken, ...]] = []
    for expert, (places, choice_N) in enumerate(
        zip(_rank(counts), torch.split_with_sizes(choice_C, sizes)[1:], strict=True)
    ):
        row_N = choice_N // index_TK.shape[1]
        id_N, share_N = ids_T[row_N], share_TK.flatten()[choice_N]
        told: list[TypicalToken] = []
        for place in places:
            is_other_N = id_N != counts.token_V[place]
            domain, before, after = _around(int(row_N[share_N.masked_fill(is_other_N, -1.0).argmax()]), readings, codec)
            told.append(
                TypicalToken(
                    token=codec.token_text(int(counts.token_V[place])),
                    token_id=int(counts.token_V[place]),
                    lift=float(lift_EV[expert, place]),
                    count=int(counts.tokens_EV[expert, place]),
                    occurrences=int(counts.occurrences_V[place]),
                    domain=domain,
                    before=before,
                    after=after,
                )
            )
        experts.append(tuple(told))
    return experts


def _rank(counts: TokenCounts) -> list[list[int]]:
    """For each expert the places in V of what is told of it, the most typical first."""
    base_E1 = counts.base_rate_E1
    shrunk_EV = (counts.tokens_EV + PRIOR * base_E1) / (counts.occurrences_V + PRIOR) / base_E1
    is_told_EV = (counts.tokens_EV >= LEAST) & (shrunk_EV > 1)
    # Of equal lift the more frequent first: sorted by count, and then stably by lift.
    by_count_EV = counts.tokens_EV.argsort(dim=1, descending=True, stable=True)
    ranked_EV = shrunk_EV.masked_fill(~is_told_EV, 0.0).gather(1, by_count_EV)
    order_EV = by_count_EV.gather(1, ranked_EV.argsort(dim=1, descending=True, stable=True))
    num_told_E = is_told_EV.sum(dim=1).clamp(max=SHOWN).tolist()
    return [order_V[:num_told].tolist() for order_V, num_told in zip(order_EV, num_told_E, strict=True)]


def _around(row: int, readings: Sequence[Reading], codec: TextCodec) -> tuple[str, str, str]:
    """Of a token's place among those of all readings: its domain, the text before it and the text after it."""
    for reading in readings:
        if row < len(reading.ids_T):
            break
        row -= len(reading.ids_T)
    before = reading.ids_T[max(0, row - _AROUND) : row].tolist()
    after = reading.ids_T[row + 1 : row + 1 + _AROUND].tolist()
    return (
        reading.domain,
        codec.decode(before, skip_special_tokens=False),
        codec.decode(after, skip_special_tokens=False),
    )
