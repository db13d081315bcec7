"""The fast split: how many of each expert's rows each of its replicas gets, for one batch. A pure function.

Rows go where they are predicted to be done first: the hosts' finish times are levelled, from what each host has to do
anyway, its measured speed, and what is in flight. Replicas that rows can flow between, also through other experts,
level each other out. It decides only where rows are computed, never what comes out of them.

Shapes: E experts of the layer, M the most replicas that any of them has, H hosts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from expertmesh.levelling import Levels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from expertmesh.placement import LayerTable, TimeModel

_TOLERANCE = 2e-3
"""How far above the least time levelling may stop: a router has no time for the rest."""


def split_rows(
    rows_E: NDArray[np.int64],
    table: LayerTable,
    busy_H: Sequence[float],
    models: Sequence[TimeModel],
    quantum: int = 16,
) -> NDArray[np.int64]:
    """counts_EM: how many of expert e's rows its m-th replica gets; they sum to `rows_E`.

    `busy_H` is the seconds until each host would be free; `models` say what rows take there. Rows go in chunks of
    `quantum`, the last one smaller, so few rows stay together: each replica used reads the expert's weights. An expert
    with rows must have a replica. Deterministic.
    """
    counts_EM = np.zeros(table.host_EM.shape, dtype=np.int64)
    replicas_E = table.num_replicas_E
    has_choice_E = (replicas_E > 1) & (rows_E > 0)
    chosen = has_choice_E.nonzero()[0]
    fixed_E = rows_E.copy()
    fixed_E[chosen] = 0
    counts_EM[:, 0] = fixed_E
    if not len(chosen):
        return counts_EM

    # In rows: what each host would get done in the time that it is busy, and then reads and computes for others.
    host_E = table.host_EM[:, 0]
    fixed_H = np.bincount(host_E, fixed_E, len(models)).tolist()
    experts_H = np.bincount(host_E[fixed_E > 0], minlength=len(models)).tolist()
    rate, load, read = [], [], []
    for fixed, experts, busy_s, model in zip(fixed_H, experts_H, busy_H, models, strict=True):
        per_s = 1 / model.row_s
        rate.append(per_s)
        load.append(fixed + (busy_s + model.launch_s + experts * model.expert_s) * per_s)
        read.append(model.expert_s * per_s)

    rows = rows_E[chosen].tolist()
    hosts = [of[:n] for of, n in zip(table.host_EM[chosen].tolist(), replicas_E[chosen].tolist(), strict=True)]
    # Few rows first, each expert's on one host; what can be parted then fills the gaps.
    for i in sorted(range(len(rows)), key=lambda i: -rows[i]):
        if rows[i] <= quantum:
            m = _soonest(hosts[i], [0] * len(hosts[i]), rows[i], load, rate, read)
            counts_EM[chosen[i], m] = rows[i]
            load[hosts[i][m]] += rows[i] + read[hosts[i][m]]
    parted = [i for i, n in enumerate(rows) if n > quantum]
    if parted:
        levels = Levels([rows[i] for i in parted], [hosts[i] for i in parted], load, rate)
        levels.settle(_TOLERANCE)
        for i, given in zip(parted, levels.given, strict=True):
            counts_EM[chosen[i], : len(hosts[i])] = _in_chunks(rows[i], hosts[i], given, quantum, load, rate, read)
    return counts_EM


def _soonest(
    hosts: list[int], counts: list[int], rows: int, load: list[float], rate: list[float], read: list[float]
) -> int:
    """Which of the hosts, by position, would be done with `rows` more first; new ones read the expert's weights too."""
    best, least = 0, float("inf")
    for m, host in enumerate(hosts):
        time = (load[host] + rows + (0.0 if counts[m] else read[host])) / rate[host]
        if time < least:
            best, least = m, time
    return best


def _in_chunks(
    rows: int,
    hosts: list[int],
    given: dict[int, float],
    quantum: int,
    load: list[float],
    rate: list[float],
    read: list[float],
) -> list[int]:
    """Round what levelling gave to whole chunks, the rest chunk by chunk to the host that is done first.

    `load` then has what was given, so that the next expert makes up for the rounding of this one.
    """
    counts = []
    left = rows
    for host in hosts:
        part = given[host]
        count = int(part) // quantum * quantum
        load[host] += count - part + (read[host] if count else 0.0)
        counts.append(count)
        left -= count
    while left > 0:
        chunk = min(left, quantum)
        m = _soonest(hosts, counts, chunk, load, rate, read)
        load[hosts[m]] += chunk + (0.0 if counts[m] else read[hosts[m]])
        counts[m] += chunk
        left -= chunk
    return counts
