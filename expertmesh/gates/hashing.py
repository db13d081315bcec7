"""Hash gates: a token's experts are a fixed function of its id, and nothing about them is learned.

Owns the tables and their use (Roller et al., arXiv 2106.04426). Knows neither text nor tokenizer. Invariant: the same
token id always goes to the same experts.

Shapes: T tokens, E experts of the layer, K experts of a token, V token ids of the vocabulary.
"""

from __future__ import annotations

import heapq

import torch

from expertmesh.errors import ConfigError
from expertmesh.gates.choices import Choices, weigh


def random_table(vocab_size: int, num_experts: int, k: int, *, generator: torch.Generator) -> torch.Tensor:
    """The random hash (section 3.1): k different experts for each token id, drawn evenly: [V, K]."""
    table_VK = torch.empty(vocab_size, k, dtype=torch.int64)
    for choice in range(k):
        # One of the experts that are left, counted past those that are taken.
        expert_V = torch.randint(num_experts - choice, (vocab_size,), generator=generator)
        for taken_V in table_VK[:, :choice].sort(dim=1).values.unbind(dim=1):
            expert_V += expert_V >= taken_V
        table_VK[:, choice] = expert_V
    return table_VK


def balanced_table(counts_V: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The balanced hash (section 3.1): ids by falling frequency, each to the expert that has least so far: [V, 1].

    `counts_V` says how often each id occurs in the training text.
    """
    table_V1 = torch.empty(len(counts_V), 1, dtype=torch.int64)
    loads = [(0.0, expert) for expert in range(num_experts)]
    counts = counts_V.tolist()
    for token_id in counts_V.argsort(descending=True, stable=True).tolist():
        load, expert = loads[0]
        heapq.heapreplace(loads, (load + counts[token_id], expert))
        table_V1[token_id] = expert
    return table_V1


def hash_gate(
    token_T: torch.Tensor,
    table_VK: torch.Tensor,
    *,
    scores_TE: torch.Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
) -> Choices:
    """The experts of each token id, by the table; they share the token equally, 1/K each.

    With `scores_TE` only the selection is fixed, and the scores weigh it as in `select.scored_topk`: so do the first
    layers of DeepSeek-V4. Raises ConfigError for an id that the table does not have.
    """
    if len(token_T) and int(token_T.max()) >= len(table_VK):
        raise ConfigError(
            f"the gate's hash table has {len(table_VK)} token ids and cannot place id {int(token_T.max())}:"
            " make it for the model's vocab_size"
        )
    index_TK = table_VK.to(token_T.device)[token_T]
    if scores_TE is not None:
        return weigh(scores_TE, index_TK, normalize=normalize, scale=scale)
    k = table_VK.shape[1]
    return Choices(index_TK=index_TK, weights_TK=torch.full(index_TK.shape, 1 / k, device=token_T.device))
