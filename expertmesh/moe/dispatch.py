"""The dispatch plan: which token rows go to which replica, and how to undo it. A pure function of its inputs.

A *pair* is one (token, chosen expert); pair p = t*K + k belongs to token t. Every pair is in exactly one part of a
plan. The plan decides only where a row is computed, never what comes out.

Shapes: T tokens, K experts per token, P pairs, E experts of the layer.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from expertmesh.errors import NoReadyReplicaError
from expertmesh.ids import ExpertId
from expertmesh.moe.loops import address, group_size, loops
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


@functools.lru_cache(maxsize=64)
def all_pairs(number: int) -> NDArray[np.int64]:
    """All indices below `number`, ascending. Not to be written to."""
    return np.arange(number)


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
    num_experts, most = table.bucket_EM.shape
    num_pairs, num_hosts = len(pairs), len(placement.hosts)
    pairs = all_pairs(num_pairs) if num_pairs == len(expert_P) else np.sort(pairs)
    counts_EM = None
    if most > 1:
        rows_E = np.bincount(expert_P if num_pairs == len(expert_P) else expert_P.take(pairs), minlength=num_experts)
        counts_EM = split_rows(rows_E, table, [0.0] * num_hosts, placement.time_models)
    num_buckets = len(table.expert_B)
    out = np.empty(group_size(num_pairs, num_buckets, num_hosts), np.int64)
    num_runs = loops().group(
        num_pairs,
        address(pairs),
        address(expert_P),
        num_choices,
        num_experts,
        most,
        0 if counts_EM is None else address(counts_EM),
        address(table.bucket_EM),
        address(table.host_B),
        num_buckets,
        num_hosts,
        address(out),
    )
    if num_runs < 0:
        raise NoReadyReplicaError(ExpertId(layer, int(expert_P[pairs[-1 - num_runs]])))
    rows = out[2 * num_pairs : 3 * num_pairs].view(np.int32)
    numbers = out[3 * num_pairs : 3 * num_pairs + 4 * num_hosts + 2 * num_runs].tolist()
    buckets, counts = numbers[4 * num_hosts :: 2], numbers[4 * num_hosts + 1 :: 2]
    experts = [table.expert_B[bucket] for bucket in buckets]
    parts = []
    pair = token = run = at = 0
    while pair < num_pairs:
        host, pair_end, token_end, run_end = numbers[at : at + 4]
        part = HostPart(
            placement.hosts[host],
            pairs=out[pair:pair_end],
            tokens=out[num_pairs + token : num_pairs + token_end],
            pair_rows=rows[pair:pair_end],
            experts=experts[run:run_end],
            counts=counts[run:run_end],
        )
        parts.append(part)
        pair, token, run, at = pair_end, token_end, run_end, at + 4
    return parts
