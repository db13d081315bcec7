"""How one request picks its next token from the model's logits.

Owns the order of the steps and what each parameter means: vLLM's. Does not know batches beyond stacking rows, nor when
a request ends. Invariant: a choice is a pure function of (logits row, parameters, tokens so far); ties go to the lowest
id.

Order: log-probabilities of the raw distribution; logit bias; stop tokens masked before `min_tokens`; repetition, then
frequency and presence penalties; temperature; min_p, top_k, top_p; Gumbel-max (see noise.py).

Shapes: B rows, V vocabulary, C candidates.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expertmesh.engine.noise import SEEDS, gumbel, least_bits_above, noise_bits
from expertmesh.kernels.cpu import has_llvm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from expertmesh.engine.api import GenerateRequest, SamplingParams

    Ids = NDArray[np.int64]
    Scores = NDArray[np.float64]

_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would only overflow (vLLM's limit)."""
_NUCLEUS_GUESS = 1024
"""How many of the most likely tokens top_p sorts first: most nuclei are smaller, and sorting a vocabulary is slow."""
_NUM_LEADERS = 256
"""How many of the most likely tokens' noise is worked out first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One chosen token. Log-probabilities are natural, of the model's own distribution."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first."""


class SamplingState:
    """What a request's next choice depends on, besides the logits."""

    def __init__(self, request: GenerateRequest, eos_token_ids: Iterable[int]) -> None:
        self.params = request.sampling
        self.num_generated = request.num_resumed
        self.position = len(request.prompt_ids)
        """Index in the sequence of the token to be chosen next."""
        self.stop_ids = frozenset(self.params.stop_token_ids)
        """Tokens that end the request."""
        if not self.params.ignore_eos:
            self.stop_ids |= frozenset(eos_token_ids)
        num_prompt = len(request.prompt_ids) - request.num_resumed
        self.prompt_ids = frozenset(request.prompt_ids[:num_prompt])
        self.generated_counts = Counter(request.prompt_ids[num_prompt:])

    def append(self, token_id: int) -> None:
        self.num_generated += 1
        self.position += 1
        self.generated_counts[token_id] += 1

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < _GREEDY_BELOW

    @property
    def is_adjusted(self) -> bool:
        """Whether anything but temperature and truncation may change the logits."""
        params = self.params
        return (
            bool(params.logit_bias)
            or self.num_generated < params.min_tokens
            or params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )

    @property
    def is_truncated(self) -> bool:
        """Whether tokens may be ruled out for being unlikely."""
        return self.params.min_p > 0 or self.params.top_k > 0 or self.params.top_p < 1.0


def choose_tokens(logits_BV: torch.Tensor, states: Sequence[SamplingState]) -> list[Choice | None]:
    """Choose the next token of each row. `logits_BV` is float32 on any device, one row per state.

    A row's entry is None when its logits have no finite maximum: the model is broken for that row only.
    """
    argmax_B = _argmax(logits_BV)
    peak_B = logits_BV.gather(1, argmax_B[:, None])[:, 0]
    token_ids = [
        token_id if is_finite else None
        for token_id, is_finite in zip(argmax_B.tolist(), peak_B.isfinite().tolist(), strict=True)
    ]
    beyond_argmax = [row for row, state in enumerate(states) if state.is_adjusted or not state.is_greedy]
    rows_BV = logits_BV if len(beyond_argmax) == len(states) else logits_BV[beyond_argmax]
    for row, logits_V in zip(beyond_argmax, rows_BV.cpu().numpy(), strict=True):
        if token_ids[row] is not None:
            token_ids[row] = choose(logits_V, states[row])
    choices = [None if token_id is None else Choice(token_id=token_id) for token_id in token_ids]

    reporting = [row for row, state in enumerate(states) if state.params.top_logprobs is not None]
    for row, logprobs_V in zip(reporting, logits_BV[reporting].log_softmax(-1).cpu().numpy(), strict=True):
        token_id = token_ids[row]
        if token_id is not None:
            choices[row] = Choice(
                token_id=token_id,
                logprob=float(logprobs_V[token_id]),
                top_logprobs=most_likely_logprobs(logprobs_V, states[row].params.top_logprobs or 0),
            )
    return choices


def choose(logits_V: NDArray[np.float32], state: SamplingState) -> int:
    """Choose the next token of one row."""
    if not (state.is_adjusted or state.is_greedy or state.is_truncated) and (contenders := _contenders()) is not None:
        params = state.params
        ids_C, bits_C = contenders(logits_V, params.temperature, params.seed % SEEDS, state.position)
        scores_C = logits_V[ids_C].astype(np.float64)
        return int(ids_C[(scores_C / params.temperature + gumbel(bits_C)).argmax()])
    scores_V = adjust(logits_V, state)
    if state.is_greedy:
        return int(scores_V.argmax())
    scores_V /= state.params.temperature
    bits_V = noise_bits(state.params.seed, state.position, len(scores_V))
    ids_C = candidates(scores_V, state.params)
    if len(ids_C) == len(scores_V):
        return _winner(scores_V, bits_V)
    return int(ids_C[_winner(scores_V[ids_C], bits_V[ids_C])])


@functools.cache
def _contenders() -> Callable[..., tuple[Ids, NDArray[np.uint64]]] | None:
    """`cpu_draw.contenders`, where machine code of ours can be made."""
    if not has_llvm():
        return None
    from expertmesh.kernels.cpu_draw import contenders

    return contenders


def adjust(logits_V: NDArray[np.float32], state: SamplingState) -> Scores:
    """A copy of the row after bias, `min_tokens` and penalties, as float64."""
    params = state.params
    scores_V = logits_V.astype(np.float64)
    for token_id, bias in params.logit_bias.items():
        scores_V[_within(scores_V, [token_id])] += bias
    if state.num_generated < params.min_tokens:
        scores_V[_within(scores_V, state.stop_ids)] = -np.inf
    if params.repetition_penalty != 1.0:
        ids_C = _within(scores_V, state.prompt_ids | state.generated_counts.keys())
        seen_C = scores_V[ids_C]
        scores_V[ids_C] = np.where(seen_C > 0, seen_C / params.repetition_penalty, seen_C * params.repetition_penalty)
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        ids_C = _within(scores_V, state.generated_counts)
        counts_C = np.array([state.generated_counts[token_id] for token_id in ids_C.tolist()], np.float64)
        scores_V[ids_C] -= params.frequency_penalty * counts_C + params.presence_penalty
    return scores_V


def candidates(scores_V: Scores, params: SamplingParams) -> Ids:
    """The ids that min_p, top_k and top_p leave, ascending. The most likely token is always among them."""
    peak = scores_V.max()
    floor = peak + math.log(params.min_p) if params.min_p > 0 else -np.inf
    ids_C = np.flatnonzero(scores_V >= floor) if params.min_p > 0 else np.arange(len(scores_V))
    if 0 < params.top_k < len(ids_C):
        ids_C = np.sort(ids_C[_most_likely(scores_V[ids_C], params.top_k)])
    if params.top_p < 1.0:
        weights_C = np.exp(scores_V[ids_C] - peak)
        ids_C = np.sort(ids_C[_nucleus(weights_C, params.top_p * weights_C.sum())])
    return ids_C


def _winner(scores_C: Scores, bits_C: NDArray[np.uint64]) -> int:
    """The index of the highest sum of score and noise.

    Most of a vocabulary is so unlikely that only rare noise could lift it to the top: the noise is worked out for a few
    leaders, and then for those of the others whose bits show that they may beat them.
    """
    if len(scores_C) <= _NUM_LEADERS:
        return int((scores_C + gumbel(bits_C)).argmax())
    cut = np.partition(scores_C, len(scores_C) - _NUM_LEADERS)[len(scores_C) - _NUM_LEADERS]
    leads_C = scores_C >= cut
    to_beat = (scores_C[leads_C] + gumbel(bits_C[leads_C])).max()
    contenders = np.flatnonzero(leads_C | (bits_C >= least_bits_above(to_beat - cut)))
    return int(contenders[(scores_C[contenders] + gumbel(bits_C[contenders])).argmax()])


def _nucleus(weights_C: Scores, mass: float) -> Ids:
    """Indices of the fewest largest weights that together reach `mass`; at least one."""
    limit = _NUCLEUS_GUESS
    while True:
        order = _most_likely(weights_C, limit)
        before = np.concatenate(([0.0], np.cumsum(weights_C[order])[:-1]))
        size = max(1, int(np.searchsorted(before, mass)))
        if size < len(order) or len(order) == len(weights_C):
            return order[:size]
        limit *= 8


def _most_likely(scores_C: NDArray[Any], limit: int) -> Ids:
    """Indices of the `limit` highest scores, highest first; of equal ones the lower index first."""
    num_scores = len(scores_C)
    if limit < num_scores:
        threshold = np.partition(scores_C, num_scores - limit)[num_scores - limit]
        indices = np.flatnonzero(scores_C >= threshold)
    else:
        indices = np.arange(num_scores)
    return indices[np.argsort(-scores_C[indices], kind="stable")][:limit]


def most_likely_logprobs(logprobs_V: NDArray[np.float32], num_top: int) -> tuple[tuple[int, float], ...]:
    """The `num_top` most likely (token id, log-probability), most likely first."""
    if num_top == 0:
        return ()
    return tuple((int(token_id), float(logprobs_V[token_id])) for token_id in _most_likely(logprobs_V, num_top))


def _within(scores_V: Scores, token_ids: Iterable[int]) -> Ids:
    """The ids that have a score: some models read tokens that they cannot write."""
    ids_C = np.array(list(token_ids), np.int64)
    return ids_C[ids_C < len(scores_V)]


def _argmax(logits_BV: torch.Tensor) -> torch.Tensor:
    """The first index of each row's maximum, or of its first NaN."""
    if logits_BV.device.type == "cpu":  # numpy's is vectorised, torch's is not: 1.5 against 9 ms for 32 rows of 152k
        return torch.from_numpy(logits_BV.numpy().argmax(axis=-1))
    return logits_BV.argmax(dim=-1)
