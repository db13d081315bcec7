"""`expertmesh bench balance`: what the slowest host takes, over the ideal, when the load is not what was planned for.

Planned for Zipf loads in random order; measured with a live batch whose experts drifted from them by lognormal
factors. The sides: no replication, EPLB with its even split, and ours, the planner with the fast split. Every slot is
usable here (`landing_slots` is 0). Beside the sides stand two lower bounds:

- of any split: the exact optimum over all fractional splits of the live batch, with our placement;
- of any placement: all rows over all rates, or more if few experts carry so much that even alone on all the hosts that
  there are slots for, k experts on at most k + spare, they take longer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from expertmesh.bench.balance_sides import OPTIONS, EvenSplit, Ours, Side, ideal_time, least_time
from expertmesh.bench.measure import environment
from expertmesh.control.planner import HostSupply
from expertmesh.ids import HostId
from expertmesh.trace import shipped
from expertmesh.trace.format import TraceReader
from expertmesh.trace.windows import windows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

DRIFT = 0.25
"""Sigma of the logarithm of the factor between an expert's planned load and its live one."""
BATCH_ROWS = 1 << 16
TRACE_HOSTS = 8
WINDOW_S = 10.0
"""Between plans on a shipped trace."""
REPLICA_BYTES = 3 * 7168 * 2048
"""One expert of DeepSeek-V3 in 8 bits: what a replica that moves is counted as."""
NONE, EPLB, OURS = "no replication", "EPLB, even split", "ours"
SPLIT_BOUND, PLACEMENT_BOUND = "bound of any split", "bound of any placement"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layer on some hosts."""

    experts: int
    hosts: int
    spare: int
    """Slots beyond one for each expert."""
    half_speed: bool = False
    """Whether every second host has half the speed."""

    @property
    def name(self) -> str:
        speed = ", half of them at half speed" if self.half_speed else ""
        return f"{self.experts} experts, {self.hosts} hosts{speed}, {self.spare} spare slots"

    def inventory(self) -> list[HostSupply]:
        slots = (self.experts + self.spare) // self.hosts
        return [
            HostSupply(host=HostId(f"h{i:03}"), slots=slots, rate=0.5 if self.half_speed and i % 2 else 1.0)
            for i in range(self.hosts)
        ]


CASES = tuple(
    Case(experts=experts, hosts=hosts, spare=spare, half_speed=half_speed)
    for half_speed in (False, True)
    for experts, hosts, spare in ((64, 8, 16), (256, 32, 32))
)


def run(*, seeds: int = 20, plans: int = 20, cases: Sequence[Case] = CASES) -> dict[str, Any]:
    """All cases with `seeds` loads each, and `plans` plans in a row under a load that wanders: a JSON-able report."""
    return {
        "bench": "balance",
        "loads": f"Zipf(1.0) in random order; live batches of {BATCH_ROWS:,} rows, drifted by lognormal({DRIFT})",
        "unit": "time of the slowest host over the ideal: all rows over all rates",
        "landing_slots": OPTIONS.landing_slots,
        "seeds": seeds,
        "cases": [_measure(case, seeds) for case in cases],
        "replica_bytes": REPLICA_BYTES,
        "wandering": [_wander(case, plans) for case in cases],
        "traces": [_follow(path) for path in shipped()],
        "environment": environment("expertmesh bench balance --json"),
    }


def zipf(num_experts: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Loads of one layer that sum to 1, the i-th heaviest 1/i of the heaviest, in random order."""
    loads_E: NDArray[np.float64] = 1 / np.arange(1, num_experts + 1)
    rng.shuffle(loads_E)
    loads_E /= loads_E.sum()
    return loads_E


def batch(loads: ArrayLike) -> NDArray[np.int64]:
    """A batch in which each expert has its part of the rows."""
    loads_E = np.asarray(loads, dtype=float)
    rows_E: NDArray[np.int64] = np.round(loads_E * (BATCH_ROWS / loads_E.sum())).astype(np.int64)
    return rows_E


def _measure(case: Case, seeds: int) -> dict[str, Any]:
    inventory = case.inventory()
    times: dict[str, list[float]] = {name: [] for name in (NONE, EPLB, OURS, SPLIT_BOUND, PLACEMENT_BOUND)}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        loads_E = zipf(case.experts, rng)
        rows_E = batch(loads_E * rng.lognormal(0, DRIFT, case.experts))
        ideal = ideal_time(rows_E, inventory)
        ours = Ours(inventory)
        sides: dict[str, Side] = {
            NONE: EvenSplit(inventory, replicates=False),
            EPLB: EvenSplit(inventory, replicates=True),
            OURS: ours,
        }
        for name, side in sides.items():
            side.plan([loads_E])
            times[name].append(side.time(0, rows_E) / ideal)
        times[SPLIT_BOUND].append(ours.least_time(0, rows_E) / ideal)
        times[PLACEMENT_BOUND].append(least_time(rows_E, inventory) / ideal)
    return {
        "case": case.name,
        "mean": {name: round(float(np.mean(of)), 4) for name, of in times.items()},
        "worst": {name: round(max(of), 4) for name, of in times.items()},
    }


def _follow(path: Path) -> dict[str, Any]:
    """A shipped trace, on hosts with a quarter more slots than there are experts, planned anew for every window."""
    trace = TraceReader(path)
    num_experts = trace.header.num_experts
    spans = [window.rows for window in windows(trace, num_experts, WINDOW_S)]
    slots = -(-sum(num_experts) * 5 // (4 * TRACE_HOSTS))
    inventory = [HostSupply(host=HostId(f"h{i}"), slots=slots) for i in range(TRACE_HOSTS)]
    return {"case": path.stem, **_compared(spans, inventory)}


def _wander(case: Case, plans: int) -> dict[str, Any]:
    """Loads that wander off, half as far from one plan to the next as a live batch from its plan."""
    rng = np.random.default_rng(0)
    loads_E = zipf(case.experts, rng)
    loads_over_time = [[loads_E]]
    for _ in range(plans):
        loads_E = loads_E * rng.lognormal(0, DRIFT / 2, case.experts)
        loads_over_time.append([loads_E])
    return {"case": case.name, **_compared(loads_over_time, case.inventory())}


def _compared(loads_over_time: Sequence[Sequence[ArrayLike]], inventory: Sequence[HostSupply]) -> dict[str, Any]:
    steps = compare(loads_over_time, inventory)
    return {
        "plans": len(steps),
        "time": {name: round(float(np.mean([step[name]["time"] for step in steps])), 4) for name in (EPLB, OURS)},
        "slower_than_eplb": sum(step[OURS]["time"] > step[EPLB]["time"] for step in steps),
        "bytes_moved": {name: sum(step[name]["moves"] for step in steps[1:]) * REPLICA_BYTES for name in (EPLB, OURS)},
    }


def compare(
    loads_over_time: Sequence[Sequence[ArrayLike]], inventory: Sequence[HostSupply]
) -> list[dict[str, dict[str, float]]]:
    """EPLB and ours side by side, planning again and again: loads_over_time[window][layer][expert].

    One row for each window but the last: planned with its loads, measured with those of the next one. Per side, `time`
    is the slowest host's over the ideal, the mean over layers that have load, and `moves` the replicas that had to be
    loaded; the first row's are all. EPLB wants equal hosts, so it has as many slots of each as the smallest.
    """
    sides: dict[str, Side] = {EPLB: EvenSplit(inventory, replicates=True), OURS: Ours(inventory)}
    steps = []
    for now, after in itertools.pairwise(loads_over_time):
        batches = [(layer, batch(loads)) for layer, loads in enumerate(after) if np.sum(loads)]
        step = {}
        for name, side in sides.items():
            moves = side.plan(now)
            times = [side.time(layer, rows_E) / ideal_time(rows_E, inventory) for layer, rows_E in batches]
            step[name] = {"time": float(np.mean(times)), "moves": moves}
        steps.append(step)
    return steps
