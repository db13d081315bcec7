"""The dispatch plan: which token rows go to which replica, and how to undo it. A pure function of its inputs.

A *pair* is one (token, chosen expert); pair p = t*K + k belongs to token t. Every pair is in exactly one part of a
plan. The plan decides only where a row is computed, never what comes out.

Shapes: T tokens, K experts per token, P pairs, E experts of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from expertmesh.errors import NoReadyReplicaError
from expertmesh.ids import ExpertId
from expertmesh.moe.split import split_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from expertmesh.ids import HostId
    from expertmesh.placement import HostInfo, Placement


@dataclass(frozen=True, slots=True)
class HostPart:
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
    """Plan where `pairs` (indices into `expert_P`, the chosen expert of every pair, in any order) are computed.

    An expert's pairs go to its replicas in contiguous runs, as long as `split_rows` says. `num_choices` is K. Nothing
    goes to hosts in `failed`, and to those in `avoided` only what no other holds. Raises NoReadyReplicaError when a
    wanted expert has no replica.
    """
    table = placement.table(layer, failed, avoided)
    num_experts = len(table.num_replicas_E)
    expert = expert_P[pairs]
    if not table.is_complete and not (replicas := table.num_replicas_E[expert]).all():
        raise NoReadyReplicaError(ExpertId(layer, int(expert[np.argmin(replicas)])))
    # The key orders pairs by host, and in it by expert.
    if table.key_EM.shape[1] == 1:
        key = table.key_EM[:, 0][expert]
    else:
        rows_E = np.bincount(expert, minlength=num_experts)
        counts_EM = split_rows(rows_E, table, [0.0] * len(placement.hosts), placement.time_models)
        key = table.key_EM[expert, _choose_replica(expert, rows_E, counts_EM)]

    # One stable sort brings the pairs of a host, and in it those of an expert, together and keeps tokens ascending.
    order = np.argsort(key, kind="stable")
    key = key[order]
    pairs = pairs[order]
    runs = [0, *(np.flatnonzero(key[1:] != key[:-1]) + 1).tolist(), len(key)]
    segments = _segments(key[runs[:-1]].tolist(), runs, num_experts)
    tokens, pair_rows = _rows_once(pairs // num_choices, segments, len(expert_P) // num_choices)
    return [
        HostPart(
            host=placement.hosts[segment.host],
            pairs=pairs[segment.start : segment.stop],
            tokens=tokens[i],
            pair_rows=pair_rows[segment.start : segment.stop],
            experts=segment.experts,
            counts=segment.counts,
        )
        for i, segment in enumerate(segments)
    ]


@dataclass(slots=True)
class _Segment:
    """The sorted pairs of one host."""

    host: int
    start: int
    stop: int
    experts: list[int]
    counts: list[int]


def _segments(keys: list[int], bounds: list[int], num_experts: int) -> list[_Segment]:
    """Join the runs of pairs with one key, run i being bounds[i] to bounds[i + 1], to segments of one host each.

    A plain loop: there are few runs, and it beats array operations one at a time.
    """
    segments: list[_Segment] = []
    for i, key in enumerate(keys):
        start, stop = bounds[i], bounds[i + 1]
        host, expert = divmod(key, num_experts)
        if not segments or segments[-1].host != host:
            segments.append(_Segment(host, start, stop, [], []))
        last = segments[-1]
        last.stop = stop
        last.experts.append(expert)
        last.counts.append(stop - start)
    return segments


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
    token_P: NDArray[np.int64], segments: list[_Segment], num_tokens: int
) -> tuple[list[NDArray[np.int64]], NDArray[np.int32]]:
    """Per segment its distinct tokens, ascending; and for each pair its token's position among them."""
    ascends = token_P[1:] > token_P[:-1]
    ascends[[segment.stop - 1 for segment in segments[:-1]]] = True
    if ascends.all():  # one expert for each host, commonly
        ranges = [np.arange(segment.stop - segment.start, dtype=np.int32) for segment in segments]
        return [token_P[segment.start : segment.stop] for segment in segments], np.concatenate(ranges)
    # All segments at once, each on its own stretch of `num_tokens` cells.
    cell_P = token_P
    if len(segments) > 1:
        lengths = [segment.stop - segment.start for segment in segments]
        cell_P = token_P + np.repeat(np.arange(len(segments)) * num_tokens, lengths)
    wanted = np.zeros(len(segments) * num_tokens, dtype=np.bool_)
    wanted[cell_P] = True
    rank = np.cumsum(wanted, dtype=np.int32) - np.int32(1)
    cells = np.flatnonzero(wanted)
    row_P = rank[cell_P]
    tokens, before = [], 0
    for i, segment in enumerate(segments):
        after = int(rank[(i + 1) * num_tokens - 1]) + 1
        tokens.append(cells[before:after] - i * num_tokens)
        row_P[segment.start : segment.stop] -= before
        before = after
    return tokens, row_P
