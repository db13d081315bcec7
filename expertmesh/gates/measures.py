"""How well a gate uses its experts, as numbers to look at. Nothing here is trained with; see `balancing` for that.

Of load, from the tokens that each expert gets (`choices.count_tokens`); of single tokens, from probabilities and
choices. Where there is nothing to judge (no token, one expert), load is even. All numbers are Python's.

Shapes: T tokens, E experts of the layer, K choices of a token.
"""

from __future__ import annotations

import math

import torch

from expertmesh.gates.choices import NO_EXPERT, Choices


def balancedness(tokens_E: torch.Tensor) -> float:
    """The mean over the most tokens of an expert: 1 if even, 1/E if all go to one.

    With experts on devices of their own, it is the share of time that they work rather than wait for the busiest.
    """
    most = float(tokens_E.max())
    return float(tokens_E.double().mean()) / most if most else 1.0


def variation(tokens_E: torch.Tensor) -> float:
    """The coefficient of variation, standard deviation over mean: 0 if even, sqrt(E - 1) if all go to one."""
    tokens_E = tokens_E.double()
    mean = float(tokens_E.mean())
    return float(tokens_E.std(correction=0)) / mean if mean else 0.0


def load_entropy(tokens_E: torch.Tensor) -> float:
    """The entropy of the experts' shares of tokens, over its maximum: 1 if even, 0 if all go to one."""
    total = float(tokens_E.sum())
    return _relative_entropy(tokens_E.double().unsqueeze(0) / total) if total else 1.0


def gate_entropy(probs_TE: torch.Tensor) -> float:
    """The mean entropy of a token's probabilities, over its maximum: 0 for a gate that is sure, 1 for one that guesses.

    NaN without tokens.
    """
    return _relative_entropy(probs_TE.double())


def is_dead(tokens_E: torch.Tensor, *, share: float = 0.0) -> torch.Tensor:
    """Which experts are dead: [E], bool. They get no token, or at most `share` of what they would get if even."""
    return tokens_E <= share * tokens_E.double().mean()


def dropped_choices(wanted: Choices, kept: Choices) -> float:
    """The share of wanted choices that capacity took away, those that went to a next best expert not counted."""
    num_wanted = int(wanted.is_expert_TK.sum())
    return 1 - int(kept.is_expert_TK.sum()) / num_wanted if num_wanted else 0.0


def dropped_tokens(choices: Choices) -> float:
    """The share of tokens with no expert at all, which the residual alone carries."""
    return float((~choices.is_expert_TK).all(dim=1).double().mean()) if len(choices.index_TK) else 0.0


def overlap(index_TK: torch.Tensor) -> float:
    """Of the choices of all tokens but the first, the share that the token before made as well, in whatever order.

    Tokens of one text in their order. By chance it is about K/E; more means that experts are local to a passage, as
    Jiang et al. find (Mixtral, arXiv 2401.04088, section 5, table 5, there of the first choice, or either of two).
    NaN without a second token.
    """
    before, after = index_TK[:-1].unsqueeze(1), index_TK[1:].unsqueeze(2)
    is_expert_TK = index_TK[1:] != NO_EXPERT
    is_shared_TK = (before == after).any(dim=2) & is_expert_TK
    num_choices = int(is_expert_TK.sum())
    return int(is_shared_TK.sum()) / num_choices if num_choices else math.nan


def _relative_entropy(probs_XE: torch.Tensor) -> float:
    """The mean entropy of the rows, over log E."""
    num_experts = probs_XE.shape[1]
    if num_experts == 1:
        return 1.0
    return float(torch.special.entr(probs_XE).sum(dim=1).mean()) / math.log(num_experts)
