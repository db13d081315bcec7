"""What keeps a gate from sending everything to a few experts while it is learned: losses, and a bias without a loss.

Each function is one term of a paper for one layer, without its coefficient; the caller multiplies, and adds layers up.
Gradients flow through probabilities, scores and weights, never through the choices. Padding is the caller's: leave
those tokens out of every argument. T is at least 1.

Shapes: T tokens, E experts of the layer, K choices of a token, N sequences.
"""

from __future__ import annotations

import torch

from expertmesh.gates.choices import NO_EXPERT, Choices, count_tokens
from expertmesh.gates.select import noise_width


def switch_loss(probs_TE: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    """E times the sum over experts of (share of choices) x (mean probability): 1 if even, E if all go to one.

    Fedus et al. (arXiv 2101.03961, equations 4 to 6) for K = 1, before capacity drops any. transformers'
    `load_balancing_loss_func` of models with K > 1 is K times this for one layer, since its shares sum to K.
    """
    num_experts = probs_TE.shape[1]
    return num_experts * (_shares(index_TK, probs_TE) * probs_TE.mean(dim=0)).sum()


def gshard_loss(probs_TE: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    """The mean over experts of (share of first choices) x (mean probability): 1/E^2 if even, 1/E if all go to one.

    Lepikhin et al. (arXiv 2006.16668, algorithm 1, line 13): only a token's first choice is counted.
    """
    return (_shares(index_TK[:, :1], probs_TE) * probs_TE.mean(dim=0)).mean()


def importance_loss(choices: Choices, num_experts: int) -> torch.Tensor:
    """The squared coefficient of variation of importance, the sum of each expert's weights: 0 if even, E - 1 at worst.

    Shazeer et al. (arXiv 1701.06538, equations 6 and 7). Even weight is not yet even load: see `load_loss`.
    """
    return _squared_variation(choices.spread(num_experts).sum(dim=0))


def load_loss(logits_TE: torch.Tensor, noise_TE: torch.Tensor, noisy_TE: torch.Tensor, k: int) -> torch.Tensor:
    """The squared coefficient of variation of expected load, the sum of `load_probability` over tokens.

    Shazeer et al. (arXiv 1701.06538, appendix A, equations 10 and 11).
    """
    return _squared_variation(load_probability(logits_TE, noise_TE, noisy_TE, k).sum(dim=0))


def load_probability(logits_TE: torch.Tensor, noise_TE: torch.Tensor, noisy_TE: torch.Tensor, k: int) -> torch.Tensor:
    """How likely each expert is to be among a token's k best if its own noise is drawn anew, the others' kept: [T, E].

    Shazeer et al. (arXiv 1701.06538, appendix A, equations 8 and 9), for `select.noisy_logits` and what it was made
    from. This makes the load differentiable, which a count is not.
    """
    if k == noisy_TE.shape[1]:
        return torch.ones_like(noisy_TE)
    best_TK = noisy_TE.topk(k + 1, dim=1).values
    kth_T1, next_T1 = best_TK[:, k - 1 : k], best_TK[:, k:]
    # What an expert has to beat: the k-th best of the others. One of the k best leaves that place to the next.
    to_beat_TE = torch.where(noisy_TE > next_T1, next_T1, kth_T1)
    probability_TE: torch.Tensor = torch.special.ndtr((logits_TE - to_beat_TE) / noise_width(noise_TE))
    return probability_TE


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """The mean squared log of the softmax's denominator: keeps logits small, and with them the error of rounding.

    Router z-loss, ST-MoE (Zoph et al., arXiv 2202.08906, equation 5).
    """
    return logits_TE.logsumexp(dim=1).square().mean()


def sequence_loss(scores_TE: torch.Tensor, index_TK: torch.Tensor, sequence_T: torch.Tensor) -> torch.Tensor:
    """`switch_loss` of each sequence apart, on scores made to sum to one, averaged over sequences.

    DeepSeek-V3's complementary sequence-wise balance loss (arXiv 2412.19437, equations 17 to 20). `index_TK` are the
    best K by score, without the bias of the selection. `sequence_T` numbers each token's sequence from 0, without gaps.
    """
    num_experts = scores_TE.shape[1]
    num_sequences = int(sequence_T.max()) + 1
    probs_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True)
    marks_TK = (index_TK != NO_EXPERT).to(scores_TE.dtype)
    chosen_TE = Choices(index_TK=index_TK, weights_TK=marks_TK).spread(num_experts)
    zero_NE = scores_TE.new_zeros(num_sequences, num_experts)
    chosen_NE = zero_NE.index_add(0, sequence_T, chosen_TE)
    length_N1 = torch.bincount(sequence_T, minlength=num_sequences).unsqueeze(1)
    mean_prob_NE = zero_NE.index_add(0, sequence_T, probs_TE) / length_N1
    share_NE = chosen_NE / chosen_NE.sum(dim=1, keepdim=True).clamp(min=1)
    return num_experts * (share_NE * mean_prob_NE).sum(dim=1).mean()


def entropy_loss(probs_TE: torch.Tensor) -> torch.Tensor:
    """The mean entropy of a token's probabilities, in nats: pushes a top-p gate to be sure, and so to use few experts.

    The dynamic loss of Huang et al. (arXiv 2403.07652, section 2.3). Not a balancing term: it needs one beside it.
    """
    entropy_T: torch.Tensor = torch.special.entr(probs_TE).sum(dim=1)
    return entropy_T.mean()


def update_bias(bias_E: torch.Tensor, tokens_E: torch.Tensor, rate: float) -> torch.Tensor:
    """The selection bias for the next step: up by `rate` where an expert got less than the mean, down where more.

    Loss-free balancing (Wang et al., arXiv 2408.15664, algorithm 1; DeepSeek-V3's bias update speed is this rate).
    No gradient is involved, so the model's loss is not disturbed. For `bias_E` of `select.scored_topk`.
    """
    tokens_E = tokens_E.to(bias_E.dtype)
    return bias_E + rate * (tokens_E.mean() - tokens_E).sign()


def _shares(index_TK: torch.Tensor, probs_TE: torch.Tensor) -> torch.Tensor:
    """Each expert's share of all choices that lead to an expert, in the dtype of `probs_TE`."""
    tokens_E = count_tokens(index_TK, probs_TE.shape[1]).to(probs_TE.dtype)
    return tokens_E / tokens_E.sum().clamp(min=1)


def _squared_variation(amount_E: torch.Tensor) -> torch.Tensor:
    """The squared coefficient of variation: variance over squared mean."""
    return amount_E.var(correction=0) / amount_E.mean().square()
