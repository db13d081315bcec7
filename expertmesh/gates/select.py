"""Gates by which each token takes the experts that score best for it: k of them, or as many as it needs, or all.

They differ in what the scores are (softmax, sigmoid, the square root of softplus), in what steers the selection besides
the scores (a bias, groups, noise), and in whether weights are made to sum to one. They know nothing of capacity.
Invariant: a token's choices depend on its own logits (and noise) only, so they are the same in every batch.

Shapes: T tokens, E experts of the layer, K = k choices of a token, G groups of experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from expertmesh.gates.choices import NO_EXPERT, Choices, best_k, weigh, widen

if TYPE_CHECKING:
    from expertmesh.gates.spec import Groups


def softmax_topk(
    logits_TE: torch.Tensor,
    k: int,
    *,
    normalize: bool = False,
    scale: float = 1.0,
    bias_E: torch.Tensor | None = None,
    groups: Groups | None = None,
) -> Choices:
    """Softmax over all experts, then the k best: weights are probabilities, and sum to less than one.

    With `normalize` (Mixtral, arXiv 2401.04088; Qwen3-MoE; DBRX) they sum to one; without it are OLMoE (arXiv
    2409.02060), Qwen2-MoE and DeepSeek-V2 (equations 20 to 22, with `groups` and `scale`). LongCat-Flash selects
    with a bias. The rest as in `scored_topk`.
    """
    return scored_topk(softmax(logits_TE), k, normalize=normalize, scale=scale, bias_E=bias_E, groups=groups)


def sigmoid_topk(
    logits_TE: torch.Tensor,
    k: int,
    *,
    normalize: bool = False,
    scale: float = 1.0,
    bias_E: torch.Tensor | None = None,
    groups: Groups | None = None,
) -> Choices:
    """Sigmoid of each logit, then the k best: experts do not compete for weight.

    DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16) normalizes, scales, and selects with a bias and groups; Llama 4
    does none of it, and multiplies the expert's input by the weight where others multiply its output.
    """
    scores_TE = _against_zero(widen(logits_TE)).softmax(dim=-1)[..., 0]
    return scored_topk(scores_TE, k, normalize=normalize, scale=scale, bias_E=bias_E, groups=groups)


def sqrt_softplus_topk(
    logits_TE: torch.Tensor,
    k: int,
    *,
    normalize: bool = False,
    scale: float = 1.0,
    bias_E: torch.Tensor | None = None,
    groups: Groups | None = None,
) -> Choices:
    """The square root of each logit's softplus, then the k best, as DeepSeek-V4 does: scores without an upper bound."""
    softplus_TE = -_against_zero(logits_TE.double()).log_softmax(dim=-1)[..., 1]
    scores_TE = softplus_TE.clamp(min=1e-30).sqrt().to(widen(logits_TE).dtype)
    return scored_topk(scores_TE, k, normalize=normalize, scale=scale, bias_E=bias_E, groups=groups)


def topk_softmax(logits_TE: torch.Tensor, k: int) -> Choices:
    """The k best logits, then softmax over these: weights sum to one.

    Shazeer et al. (arXiv 1701.06538, equations 3 and 5, without noise), gpt-oss, JetMoE, Granite. In exact arithmetic
    the same as `softmax_topk` with `normalize`.
    """
    logits_TE = widen(logits_TE)
    index_TK = best_k(logits_TE, k)
    return Choices(index_TK=index_TK, weights_TK=softmax(logits_TE.gather(1, index_TK)))


def noisy_topk(
    logits_TE: torch.Tensor, noise_TE: torch.Tensor, k: int, *, generator: torch.Generator | None = None
) -> Choices:
    """Noisy top-k gating (Shazeer et al., arXiv 1701.06538, equations 3 to 5): `topk_softmax` of `noisy_logits`."""
    return topk_softmax(noisy_logits(logits_TE, noise_TE, generator=generator), k)


def noisy_logits(
    logits_TE: torch.Tensor, noise_TE: torch.Tensor, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """H of equation 4: logits plus normal noise, as wide as the learned `noise_TE` (x W_noise) says for each pair.

    Noise is for training, where it lets experts be tried that are not the best so far. Without a generator there is
    none.
    """
    logits_TE = widen(logits_TE)
    if generator is None:
        return logits_TE
    normal_TE = torch.randn(logits_TE.shape, generator=generator, dtype=logits_TE.dtype, device=generator.device)
    return logits_TE + normal_TE.to(logits_TE.device) * noise_width(noise_TE)


def noise_width(noise_TE: torch.Tensor) -> torch.Tensor:
    """The standard deviation of `noisy_logits`' noise: the softplus of equation 4, kept off zero."""
    return F.softplus(widen(noise_TE)).clamp(min=1e-6)


def dense(logits_TE: torch.Tensor) -> Choices:
    """Every expert, weighted by softmax (Jacobs et al., 1991, the mixture that all this began with).

    K is E, in the experts' order. The most that a layer's experts can say, at E/k times the work.
    """
    index_TE = torch.arange(logits_TE.shape[1], device=logits_TE.device).expand(logits_TE.shape)
    return Choices(index_TK=index_TE, weights_TK=softmax(logits_TE))


def top_p(
    logits_TE: torch.Tensor, p: float, *, k: int | None = None, normalize: bool = False, scale: float = 1.0
) -> Choices:
    """Dynamic k: the fewest experts whose probabilities sum to p or more, at least one, at most k if given.

    Huang et al. (arXiv 2403.07652, section 2.2: "top-p", "dynamic routing"). Weights are the probabilities; `normalize`
    makes them sum to one and `scale` multiplies them, for a model that was trained so. A sure token costs one expert,
    an unsure one many. K is `k`, or E without it; see `Choices.trimmed`.
    """
    probs_TE = softmax(logits_TE)
    index_TK = best_k(probs_TE, probs_TE.shape[1] if k is None else k)
    best_TK = probs_TE.gather(1, index_TK)
    sum_before_TK = F.pad(best_TK.cumsum(dim=-1)[:, :-1], (1, 0))
    return weigh(probs_TE, index_TK.where(sum_before_TK < p, NO_EXPERT), normalize=normalize, scale=scale)


def threshold(logits_TE: torch.Tensor, ratio: float, k: int, *, normalize: bool = False, scale: float = 1.0) -> Choices:
    """Of the k experts with the best probabilities, those that have `ratio` times the best one's or more.

    Dynamic expert skipping (Lu et al., arXiv 2402.14800, where k is 2 and the ratio is called beta). The rest as in
    `top_p`.
    """
    probs_TE = softmax(logits_TE)
    index_TK = best_k(probs_TE, k)
    best_TK = probs_TE.gather(1, index_TK)
    kept_TK = index_TK.where(best_TK >= ratio * best_TK[:, :1], NO_EXPERT)
    return weigh(probs_TE, kept_TK, normalize=normalize, scale=scale)


def scored_topk(
    scores_TE: torch.Tensor,
    k: int,
    *,
    normalize: bool = False,
    scale: float = 1.0,
    bias_E: torch.Tensor | None = None,
    groups: Groups | None = None,
) -> Choices:
    """The k best of scores that are not negative, as weights; with `normalize` they sum to one; then times `scale`.

    `bias_E` is added for the selection only, never to the weights (Wang et al., arXiv 2408.15664, equation 3;
    `balancing.update_bias` learns it). `groups` limits the selection.
    """
    with torch.no_grad():  # a selection has no gradient
        ranked_TE = scores_TE if bias_E is None else scores_TE + bias_E
        if groups is not None:
            ranked_TE = ranked_TE.masked_fill(~_in_kept_groups(ranked_TE, groups), -torch.inf)
        index_TK = best_k(ranked_TE, k)
    return weigh(scores_TE, index_TK, normalize=normalize, scale=scale)


def softmax(logits_TE: torch.Tensor) -> torch.Tensor:
    """Probabilities over the last dimension, in the precision of gates."""
    return widen(logits_TE).softmax(dim=-1)


def _against_zero(logits_TE: torch.Tensor) -> torch.Tensor:
    """[T, E, 2], each logit beside a 0, whose softmax is a sigmoid and whose log-softmax is minus a softplus.

    Detours on purpose: torch's own `sigmoid` and `softplus` on a CPU take another path at the end of an array than
    before it, and differ there in the last bit, so that a token's weights would depend on its batch. Rows do not.
    """
    return torch.stack([logits_TE, torch.zeros_like(logits_TE)], dim=-1)


def _in_kept_groups(ranked_TE: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Which experts are in the `kept` best groups of each token."""
    num_tokens, num_experts = ranked_TE.shape
    by_group_TGe = ranked_TE.reshape(num_tokens, groups.num, num_experts // groups.num)
    best = 2 if groups.score == "top2" else 1
    group_scores_TG = by_group_TGe.topk(best, dim=-1).values.sum(dim=-1)
    is_kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    is_kept_TG.scatter_(1, best_k(group_scores_TG, groups.kept), True)
    return is_kept_TG.unsqueeze(-1).expand_as(by_group_TGe).flatten(1)
