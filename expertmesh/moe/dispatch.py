"""The dispatch plan: which token rows go to which replica, and how to undo it. A pure function of its inputs.

A *pair* is one (token, chosen expert); pair p = t*K + k belongs to token t. Every pair is in exactly one part of a
plan. The plan decides only where a row is computed, never what comes out.

Shapes: T tokens, K experts per token, P pairs, E experts of the layer.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from expertmesh.errors import NoReadyReplicaError
from expertmesh.ids import ExpertId
from expertmesh.moe.split import split_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from expertmesh.ids import HostId
    from expertmesh.placement import HostInfo, Placement


class HostPart(NamedTuple):
    """The part of a plan that one host computes. Its pairs are grouped by expert."""

    host: HostInfo
    pairs: NDArray[np.int64]
    """[p] which pairs, in the order in which they travel and come back."""
    tokens: NDArray[np.int64]
    """[t] the tokens whose rows travel, ascending, each once."""
    pair_rows: NDArray[np.int32]
    """[p] for each pair, its row among `tokens`."""
    experts: list[int]
    """[e] the experts wanted, each once."""
    counts: list[int]
    """[e] how many of the pairs each takes."""


def make_dispatch_plan(
    placement: Placement,
    layer: int,
    expert_P: NDArray[np.int64],
    num_choices: int,
    pairs: NDArray[np.int64],
    *,
    failed: frozenset[HostId] = frozenset(),
    avoided: frozenset[HostId] = frozenset(),
) -> list[HostPart]:
    """Plan where `pairs` (distinct indices into `expert_P`, the chosen expert of every pair) are computed.

    Each of `pairs` must have an expert: what stands in `expert_P` for the others is not looked at. An expert's pairs go
    to its replicas in contiguous runs, as long as `split_rows` says. `num_choices` is K. Nothing goes to hosts in
    `failed`, and to those in `avoided` only what no other holds. Raises NoReadyReplicaError when a wanted expert has no
    replica.
    """
    table = placement.table(layer, failed, avoided)
    num_experts = len(table.num_replicas_E)
    are_all = len(pairs) == len(expert_P)
    if not are_all:
        pairs = np.sort(pairs)
    expert = expert_P if are_all else expert_P.take(pairs)
    if not table.is_complete and not (replicas := table.num_replicas_E.take(expert)).all():
        raise NoReadyReplicaError(ExpertId(layer, int(expert[np.argmin(replicas)])))
    # The key orders pairs by host, and in it by expert.
    if table.key_EM.shape[1] == 1:
        key = table.key_EM.take(expert)
    else:
        rows_E = np.bincount(expert, minlength=num_experts)
        counts_EM = split_rows(rows_E, table, [0.0] * len(placement.hosts), placement.time_models)
        key = table.key_EM[expert, _choose_replica(expert, rows_E, counts_EM)]

    # One stable sort brings the pairs of a host, and in it those of an expert, together and keeps tokens ascending.
    order = key.argsort(kind="stable")
    key = key.take(order)
    pairs = order if are_all else pairs.take(order)
    tokens = pairs // num_choices
    # Runs of one expert on one host: where each stops, and whose it is.
    stops = ((key[1:] != key[:-1]).nonzero()[0] + 1).tolist()
    stops.append(len(key))
    starts = [0, *stops[:-1]]
    host, index = (of.tolist() for of in np.divmod(key.take(starts), num_experts))

    parts = []
    num_tokens = len(expert_P) // num_choices
    first = 0
    while first < len(stops):
        last = bisect.bisect_right(host, host[first], first)
        start, stop = starts[first], stops[last - 1]
        rows, pair_rows = _rows_once(tokens[start:stop], num_tokens, last - first)
        counts = [stop - start for start, stop in zip(starts[first:last], stops[first:last], strict=True)]
        part = HostPart(placement.hosts[host[first]], pairs[start:stop], rows, pair_rows, index[first:last], counts)
        parts.append(part)
        first = last
    return parts


def _choose_replica(
    expert: NDArray[np.int64], rows_E: NDArray[np.int64], counts_EM: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each pair, the ordinal of its replica: the first counts_EM[e, 0] of an expert's pairs go to its first."""
    order = np.argsort(expert, kind="stable")
    start_E = np.cumsum(rows_E) - rows_E
    rank = np.empty_like(expert)
    rank[order] = np.arange(len(expert)) - start_E[expert[order]]
    ends_EM = np.cumsum(counts_EM[:, :-1], axis=1)
    replica: NDArray[np.int64] = (rank[:, None] >= ends_EM[expert]).sum(axis=1)
    return replica


def _rows_once(
    token_P: NDArray[np.int64], num_tokens: int, num_experts: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The distinct tokens of a host's pairs, ascending; and for each pair its token's position among them."""
    is_wanted_T = np.zeros(num_tokens, dtype=np.bool_)
    is_wanted_T[token_P] = True
    tokens = is_wanted_T.nonzero()[0]
    if num_experts == 1 and len(tokens) == len(token_P):
        return tokens, np.arange(len(tokens), dtype=np.int32)
    if len(tokens) == num_tokens:
        return tokens, token_P.astype(np.int32)
    rank_T = is_wanted_T.cumsum(dtype=np.int32)
    return tokens, rank_T.take(token_P) - np.int32(1)
