"""`expertmesh bench planner`: how long a plan takes, and how that grows with experts, hosts and layers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from expertmesh.bench.balance import DRIFT, zipf
from expertmesh.bench.balance_sides import OPTIONS
from expertmesh.bench.measure import environment
from expertmesh.control.planner import HostSupply, plan
from expertmesh.ids import HostId

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIZES = ((1, 64, 8), (1, 256, 32), (61, 256, 32), (1, 1024, 128), (1, 4096, 500), (1, 8192, 1000))
"""Layers, experts of each, hosts. There is a spare slot for each host and layer."""


def run(*, repeats: int = 5, sizes: Sequence[tuple[int, int, int]] = SIZES) -> dict[str, Any]:
    """Per size, the least of `repeats`: a first plan, one after the load has drifted, one when nothing changed."""
    return {
        "bench": "planner",
        "loads": f"Zipf(1.0) in random order; drifted by lognormal({DRIFT})",
        "sizes": [_measure(*size, repeats) for size in sizes],
        "environment": environment("expertmesh bench planner --json"),
    }


def _measure(layers: int, experts: int, hosts: int, repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    loads = [zipf(experts, rng).tolist() for _ in range(layers)]
    drifted = [(np.array(layer) * rng.lognormal(0, DRIFT, experts)).tolist() for layer in loads]
    slots = layers * -(-(experts + hosts) // hosts)
    inventory = [HostSupply(host=HostId(f"h{i:04}"), slots=slots) for i in range(hosts)]
    first = plan(loads, inventory, None, OPTIONS).replicas
    return {
        "layers": layers,
        "experts": experts,
        "hosts": hosts,
        "milliseconds": {
            "first": _least_ms(lambda: plan(loads, inventory, None, OPTIONS), repeats),
            "drifted": _least_ms(lambda: plan(drifted, inventory, first, OPTIONS), repeats),
            "unchanged": _least_ms(lambda: plan(loads, inventory, first, OPTIONS), repeats),
        },
    }


def _least_ms(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return round(1e3 * min(times), 3)
