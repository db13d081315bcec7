"""DeepSeek's expert-parallel load balancer (EPLB), as a baseline: written anew from its published description.

It takes one layer's loads to a fixed number of replicas on equal hosts, and has no memory. Rows of an expert are then
shared evenly by its replicas. https://github.com/deepseek-ai/EPLB
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def replicate(loads: Sequence[float], num_replicas: int) -> list[int]:
    """The expert of each replica: one of each, then each further one of the expert with most load per replica."""
    replicas = list(range(len(loads)))
    counts = [1] * len(loads)
    waiting = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(waiting)
    while len(replicas) < num_replicas:
        _, expert = waiting[0]
        replicas.append(expert)
        counts[expert] += 1
        heapq.heapreplace(waiting, (-loads[expert] / counts[expert], expert))
    return replicas


def pack(loads: Sequence[float], num_packs: int) -> list[list[int]]:
    """Items in packs of equal size: heaviest first, each into the lightest pack that has room."""
    assert len(loads) % num_packs == 0
    size = len(loads) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    lightest = [(0.0, pack) for pack in range(num_packs)]
    for item in sorted(range(len(loads)), key=lambda item: (-loads[item], item)):
        load, pack = heapq.heappop(lightest)
        packs[pack].append(item)
        if len(packs[pack]) < size:
            heapq.heappush(lightest, (load + loads[item], pack))
    return packs


def place(
    loads: Sequence[float], num_hosts: int, slots: int, *, num_groups: int = 1, num_nodes: int = 1
) -> list[list[int]]:
    """The expert in each slot of each host; one host may hold an expert twice. Every slot is used.

    When the groups of experts divide evenly among the nodes, groups are packed to nodes first and each node's experts
    replicated and packed within it (the hierarchical policy); otherwise over all hosts at once (the global policy).
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size = len(loads) // num_groups
    hosts_per_node = num_hosts // num_nodes
    of_group = [sum(loads[group * size : (group + 1) * size]) for group in range(num_groups)]
    hosts = []
    for groups in pack(of_group, num_nodes):
        experts = [group * size + i for group in groups for i in range(size)]
        replicas = [experts[i] for i in replicate([loads[expert] for expert in experts], hosts_per_node * slots)]
        counts = Counter(replicas)
        shares = [loads[expert] / counts[expert] for expert in replicas]
        hosts += [[replicas[i] for i in of_host] for of_host in pack(shares, hosts_per_node)]
    return hosts
