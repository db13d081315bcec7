"""How many replicas each expert deserves, from its load alone.

An expert deserves another replica while its load over its replicas stands out among the layer's experts. Slots are one
budget over all layers: the expert that stands out most gets the next.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertmesh.control.planner.values import Loads

_OFFSET = 0.2
"""Loads are divided by (replicas - this): the load of an expert with few replicas swings more, relative to what they
can take, so it counts for more than its even share. 0 is plain division; tuned on drifting Zipf loads."""
_EARN = 1.5
"""An expert earns its second replica at this many times the unit ..."""
_RETIRE = 1.1
"""... and may lose it below this many. Between the two, things stay as they are."""
_LEAST_PART = 1 / 12
"""Experts below this part of an average host's work are never hot: hosts can be packed level with pieces so small."""


def heat_unit(loads: Sequence[float], num_hosts: int) -> float:
    """The load that an expert of one layer is measured by: the average expert's, within bounds set by a host's work."""
    total = sum(loads)
    budget = total / num_hosts
    return min(max(total / len(loads), budget * _LEAST_PART), budget)


def earns_another(load: float, replicas: int, unit: float) -> bool:
    return load / (replicas - _OFFSET) > unit * _EARN / (1 - _OFFSET)


def may_retire_one(load: float, replicas: int, unit: float) -> bool:
    """Whether an expert with this many replicas would hardly miss one."""
    return load / (replicas - 1 - _OFFSET) < unit * _RETIRE / (1 - _OFFSET)


def deserved(loads: Loads, num_hosts: int, min_replicas: int, spare: int) -> list[list[int]]:
    """Replicas per layer and expert: `min_replicas` each, and at most `spare` more in all, at most one on each host."""
    counts = [[min_replicas] * len(layer) for layer in loads]
    units = [heat_unit(layer, num_hosts) if layer else 0.0 for layer in loads]
    waiting = [
        (-load / (min_replicas - _OFFSET), number, expert)
        for number, layer in enumerate(loads)
        for expert, load in enumerate(layer)
        if earns_another(load, min_replicas, units[number])
    ]
    heapq.heapify(waiting)
    while waiting and spare > 0:
        _, number, expert = waiting[0]
        count = counts[number][expert]
        if count >= num_hosts or not earns_another(loads[number][expert], count, units[number]):
            heapq.heappop(waiting)
            continue
        counts[number][expert] = count = count + 1
        spare -= 1
        heapq.heapreplace(waiting, (-loads[number][expert] / (count - _OFFSET), number, expert))
    return counts
