"""Gates under which an expert takes only so many tokens, and what becomes of the others.

Capacity makes an expert's work predictable, which fixed shapes and even devices like, and ties tokens together: what
one token gets depends on the others of its group (the T tokens of a call, by GShard's word). So an answer is no longer
the same in every batch; serve with it only where that is accepted.

Invariant: no expert is chosen by more tokens of a call than its capacity.

Shapes: T tokens, E experts of the layer, K choices of a token.
"""

from __future__ import annotations

import torch

from expertmesh.errors import ConfigError
from expertmesh.gates.choices import NO_EXPERT, Choices, best_k, count_tokens, mark, weigh
from expertmesh.gates.select import softmax


def limit_to_capacity(
    index_TK: torch.Tensor,
    scores_TE: torch.Tensor,
    capacity: int,
    *,
    overflow: str = "drop",
    priority_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same choices, as far as there is room: each expert `capacity` times at most.

    All first choices are served before any second one (GShard, algorithm 1), and of one rank, tokens in their order, or
    those of highest `priority_T` first. Raises ConfigError where a choice finds no room and `overflow` is "error".
    """
    num_experts = scores_TE.shape[1]
    if overflow == "error":
        _refuse_overflow(count_tokens(index_TK, num_experts), capacity)
        return index_TK
    order_T = torch.arange(len(index_TK), device=index_TK.device)
    if priority_T is not None:
        order_T = priority_T.argsort(descending=True, stable=True)
    wanted_TK, scores_TE = index_TK[order_T], scores_TE[order_T]
    kept_TK = torch.full_like(index_TK, NO_EXPERT)
    room_E = torch.full((num_experts,), capacity, device=index_TK.device)
    holds_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    for k in range(index_TK.shape[1]):
        wanted_T = wanted_TK[:, k]
        while True:
            is_in_TE = _admit(wanted_T, holds_TE, room_E)
            room_E = room_E - is_in_TE.sum(dim=0)
            holds_TE |= is_in_TE
            is_in_T = is_in_TE.any(dim=1)
            kept_TK[order_T[is_in_T], k] = wanted_T[is_in_T]
            wanted_T = wanted_T.masked_fill(is_in_T, NO_EXPERT)
            if overflow == "drop" or not (wanted_T != NO_EXPERT).any():
                break
            # Each further pass seats every token or fills an expert, so there are at most E of them.
            wanted_T = _next_best(wanted_T, scores_TE, ~holds_TE & (room_E > 0))
    return kept_TK


def switch(
    logits_TE: torch.Tensor, *, capacity: int | None = None, overflow: str = "drop", by_confidence: bool = False
) -> Choices:
    """Switch Transformers' top-1 (Fedus et al., arXiv 2101.03961, equations 1 to 3): softmax, then the best expert.

    The weight is the probability, not one: it is what the gate learns by. Without `capacity` there is no limit. With
    `by_confidence` the tokens with the highest probability come first, not those that stand first (batch prioritized
    routing: Riquelme et al., arXiv 2106.05974, section 4).
    """
    probs_TE = softmax(logits_TE)
    wanted_TK = best_k(probs_TE, 1)
    index_TK = wanted_TK
    if capacity is not None:
        priority_T = probs_TE.amax(dim=1) if by_confidence else None
        index_TK = limit_to_capacity(index_TK, probs_TE, capacity, overflow=overflow, priority_T=priority_T)
    return weigh(probs_TE, index_TK)


def gshard(
    logits_TE: torch.Tensor,
    *,
    capacity: int | None = None,
    overflow: str = "drop",
    by_confidence: bool = False,
    normalize_kept: bool = False,
    generator: torch.Generator | None = None,
) -> Choices:
    """GShard's top-2 (Lepikhin et al., arXiv 2006.16668, section 2.2, algorithm 1): softmax, then the two best experts.

    The two weights sum to one before anything is dropped; with `normalize_kept` (NLLB-MoE) what is kept sums to one.
    With a generator the second expert is taken at random, with twice its weight as probability ("random routing"): one
    that counts for little is mostly spared, and takes no room. `capacity` and `by_confidence` as in `switch`.
    """
    probs_TE = softmax(logits_TE)
    wanted_TK = best_k(probs_TE, 2)
    index_TK = wanted_TK
    if generator is not None:
        second_T = weigh(probs_TE, wanted_TK, normalize=True).weights_TK[:, 1].detach()
        uniform_T = torch.rand(len(second_T), generator=generator, device=generator.device).to(second_T.device)
        is_spared_T = 2 * second_T <= uniform_T
        index_TK = torch.stack([wanted_TK[:, 0], wanted_TK[:, 1].masked_fill(is_spared_T, NO_EXPERT)], dim=1)
    if capacity is not None:
        priority_T = probs_TE.amax(dim=1) if by_confidence else None
        index_TK = limit_to_capacity(index_TK, probs_TE, capacity, overflow=overflow, priority_T=priority_T)
    return weigh(probs_TE, index_TK, normalize=True, wanted_TK=None if normalize_kept else wanted_TK)


def expert_choice(logits_TE: torch.Tensor, capacity: int) -> Choices:
    """Experts choose: each takes the `capacity` tokens that score highest for it, all T where there are fewer.

    Zhou et al. (arXiv 2202.09368, equations 1 and 2), with `expert_capacity(T, E, 1, c)` for their k = nc/e. Load is
    even by construction; a token may get any number of experts, or none. Weights are probabilities over experts. K is
    E, best first; see `Choices.trimmed`. A token's experts depend on tokens after it, so a causal model that is trained
    with it sees its future, and one that is served with it answers otherwise in another batch.
    """
    probs_TE = softmax(logits_TE)
    taken_EC = best_k(probs_TE.T, min(capacity, len(probs_TE)))
    is_chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(0, taken_EC.T, True)
    return weigh(probs_TE, mark(probs_TE, is_chosen_TE))


def _refuse_overflow(tokens_E: torch.Tensor, capacity: int) -> None:
    most = int(tokens_E.max())
    if most > capacity:
        raise ConfigError(
            f"gate.overflow is error, and expert {int(tokens_E.argmax())} is chosen by {most} tokens where its capacity"
            f" is {capacity}: raise gate.capacity_factor, or set gate.overflow to drop or next-best"
        )


def _admit(wanted_T: torch.Tensor, holds_TE: torch.Tensor, room_E: torch.Tensor) -> torch.Tensor:
    """Which tokens get the expert that they want and do not hold yet, in order, as long as there is room: [T, E]."""
    wants_TE = (wanted_T.unsqueeze(1) == torch.arange(len(room_E), device=room_E.device)) & ~holds_TE
    return wants_TE & (wants_TE.cumsum(dim=0) <= room_E)


def _next_best(wanted_T: torch.Tensor, scores_TE: torch.Tensor, is_free_TE: torch.Tensor) -> torch.Tensor:
    """For each token that still wants an expert, the best that is free for it, or NO_EXPERT."""
    best_T = scores_TE.masked_fill(~is_free_TE, -torch.inf).argmax(dim=1)
    is_found_T = (wanted_T != NO_EXPERT) & is_free_TE.any(dim=1)
    return best_T.where(is_found_T, NO_EXPERT)
