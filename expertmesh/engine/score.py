"""Log-probabilities of a prompt's own tokens, by one forward over it.

Knows nothing of batches or caches. Invariant: of each position, the reported values come from one row, so the arg-max's
and the actual token's are the identical float when they are the same token.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expertmesh.engine.api import PromptLogprobs
from expertmesh.engine.batch import gates_set
from expertmesh.engine.sampling import most_likely_logprobs
from expertmesh.errors import NotFiniteError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expertmesh.engine.batch import RowGates
    from expertmesh.gates.spec import GateSpec

_CHUNK = 256
"""Positions whose log-probabilities are held at once: a float32 copy of all logits can outweigh the model."""


def score_prompt(
    model: Any,
    prompt_ids: tuple[int, ...],
    num_top: int,
    gate: GateSpec | None = None,
    gates: RowGates | None = None,
) -> PromptLogprobs:
    """Score `prompt_ids`, reporting at least the most likely token of each position. Raises NotFiniteError."""
    input_ids_1T = torch.tensor([prompt_ids], device=model.device)
    with _plain_attention(model), gates_set(gates, [(gate, len(prompt_ids))]):
        logits_TV = model(input_ids=input_ids_1T, use_cache=False).logits[0]
    token_logprobs: list[float | None] = [None]
    top_logprobs: list[tuple[tuple[int, float], ...]] = [()]
    for start in range(0, len(prompt_ids) - 1, _CHUNK):
        targets = prompt_ids[start + 1 : start + 1 + _CHUNK]
        logprobs_CV = torch.log_softmax(logits_TV[start : start + len(targets)].float(), dim=-1).cpu().numpy()
        if np.isnan(logprobs_CV.max()):  # one that is not finite makes its whole row NaN
            raise NotFiniteError("the model's logits are not finite; the prompt has no log-probabilities")
        for token_id, logprobs_V in zip(targets, logprobs_CV, strict=True):
            token_logprobs.append(float(logprobs_V[token_id]))
            top_logprobs.append(most_likely_logprobs(logprobs_V, max(1, num_top)))
    return PromptLogprobs(token_logprobs=tuple(token_logprobs), top_logprobs=tuple(top_logprobs))


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Paged eager attention, which continuous batching may have put in, refuses to run without a paged cache."""
    attention = model.config._attn_implementation
    if not attention.startswith("paged|"):
        yield
        return
    model.set_attn_implementation(attention.removeprefix("paged|"))
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
