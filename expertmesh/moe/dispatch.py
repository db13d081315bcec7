"""The dispatch plan: which token rows go to which replica, and how to undo it. A pure function of its inputs.

A *pair* is one (token, chosen expert); pair p = t*K + k belongs to token t. Every pair is in exactly one part of a
plan. The plan decides only where a row is computed, never what comes out.

Shapes: T tokens, K experts per token, P pairs, E experts of the layer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from expertmesh.errors import NoReadyReplicaError
from expertmesh.ids import ExpertId

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
    placement: Placement, layer: int, expert_P: NDArray[np.int64], num_choices: int, pairs: NDArray[np.int64]
) -> list[HostPart]:
    """Plan where `pairs` (indices into `expert_P`, the chosen expert of every pair, in any order) are computed.

    An expert's pairs are split over its replicas in equal contiguous runs, in the placement's order. `num_choices`
    is K. Raises NoReadyReplicaError when a wanted expert has no replica.
    """
    table = placement.layers[layer]
    num_experts = len(table.num_replicas_E)
    expert = expert_P[pairs]
    if not table.is_complete and not (replicas := table.num_replicas_E[expert]).all():
        raise NoReadyReplicaError(ExpertId(layer, int(expert[np.argmin(replicas)])))
    if table.host_EM.shape[1] == 1:
        host = table.host_EM[expert, 0]
    else:
        host = table.host_EM[expert, _choose_replica(expert, table.num_replicas_E[expert], num_experts)]

    # One stable sort brings the pairs of a host, and in it those of an expert, together and keeps tokens ascending.
    # From here on, plain loops over the few runs beat one more array operation at a time.
    key = host * num_experts + expert
    order = np.argsort(key, kind="stable")
    key = key[order]
    run_starts = [0, *(np.flatnonzero(key[1:] != key[:-1]) + 1).tolist()]
    runs_of: dict[int, list[tuple[int, int, int]]] = {}
    for start, stop in itertools.pairwise([*run_starts, len(key)]):
        run_host, run_expert = divmod(int(key[start]), num_experts)
        runs_of.setdefault(run_host, []).append((run_expert, start, stop))

    parts = []
    for run_host, runs in runs_of.items():
        chosen = pairs[order[runs[0][1] : runs[-1][2]]]
        tokens, pair_rows = _rows_once(chosen // num_choices, len(expert_P) // num_choices)
        parts.append(
            HostPart(
                host=placement.hosts[run_host],
                pairs=chosen,
                tokens=tokens,
                pair_rows=pair_rows,
                experts=[run_expert for run_expert, _, _ in runs],
                counts=[stop - start for _, start, stop in runs],
            )
        )
    return parts


def _choose_replica(expert: NDArray[np.int64], replicas: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """For each pair, the ordinal of its replica: the i-th of an expert's n pairs goes to replica i * r // n."""
    order = np.argsort(expert, kind="stable")
    counts = np.bincount(expert, minlength=num_experts)
    start = np.cumsum(counts) - counts
    rank = np.empty_like(expert)
    rank[order] = np.arange(len(expert)) - start[expert[order]]
    return rank * replicas // counts[expert]


def _rows_once(token: NDArray[np.int64], num_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The distinct tokens, ascending, and for each entry of `token` its position among them."""
    wanted = np.zeros(num_tokens, dtype=np.bool_)
    wanted[token] = True
    tokens = np.flatnonzero(wanted)
    position = np.cumsum(wanted, dtype=np.int32) - 1
    return tokens, position[token].astype(np.int32, copy=False)
