"""What the controller knows, as others want to see it. Pure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any

from expertmesh.control.planner import HostSupply
from expertmesh.control.state import ReplicaStatus
from expertmesh.control.wanted import Supply
from expertmesh.ids import ExpertId
from expertmesh.levelling import Levels
from expertmesh.placement import TimeModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from expertmesh.control.cluster import RunningHost
    from expertmesh.control.members import Member
    from expertmesh.control.planner import Change
    from expertmesh.control.progress import Move
    from expertmesh.control.state import HostState
    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.ids import HostId
    from expertmesh.placement import Placement


def supply(state: HostState, running: RunningHost, rate: float, cost: float) -> Supply:
    """A host as the planner sees it."""
    host = HostSupply(host=state.id, slots=0, rate=rate, node=running.node, rack=running.rack, cost=cost)
    return Supply(slots=state.slots, host=host)


def usual(models: Iterable[TimeModel]) -> TimeModel:
    """What an unmeasured host is taken for: the median of the measured ones."""
    known = [dataclasses.astuple(model) for model in models]
    return TimeModel(*map(statistics.median, zip(*known, strict=True))) if known else TimeModel()


def differ(measured: TimeModel, told: TimeModel, part: float) -> bool:
    """Whether two time models differ by more than `part`, for a few rows of one expert or for many."""
    return any(
        abs(measured.seconds(rows, 1) - told.seconds(rows, 1)) > part * told.seconds(rows, 1) for rows in (8, 512)
    )


def imbalance(
    placement: Placement, loads: Sequence[Sequence[float]], rate: Mapping[HostId, float]
) -> list[float | None]:
    """Per layer, how long its slowest host takes for the load over what would be ideal, with the best split of it.

    1 is perfect. `rate` names the hosts that run, with their rates. None for a layer without load.
    """
    number = {host: i for i, host in enumerate(rate)}
    rates = list(rate.values())
    found: list[float | None] = []
    for layer, of_layer in enumerate(loads):
        holders = [placement.replicas.get(ExpertId(layer, index), ()) for index in range(len(of_layer))]
        choices = [[number[host] for host in hosts if host in number] for hosts in holders]
        held = [i for i, hosts in enumerate(choices) if hosts and of_layer[i]]
        if not held:
            found.append(None)
            continue
        levels = Levels([of_layer[i] for i in held], [choices[i] for i in held], [0.0] * len(rates), rates)
        levels.settle()
        slowest = max(load / rate for load, rate in zip(levels.load, rates, strict=True))
        found.append(slowest * sum(rates) / sum(levels.load))
    return found


def load(placement: Placement | None, loads: Sequence[Sequence[float]], rate: Mapping[HostId, float]) -> dict[str, Any]:
    """Of /mesh/load, what the placement makes of it."""
    of_layers = imbalance(placement, loads, rate) if placement else [None for _ in loads]
    known = [ratio for ratio in of_layers if ratio is not None]
    mean = sum(known) / len(known) if known else None
    return {"per_second": loads, "imbalance": mean, "imbalance_of_layers": of_layers}


def placement(published: Placement, served: HostConfiguration) -> dict[str, Any]:
    """What /mesh/placement answers: who holds what, and the width and type of the rows that experts take and give."""
    spec = served.spec(0)  # any layer's: rows are the model's hidden states, which are alike in all of them
    return published.to_json() | {"hidden": spec.hidden, "dtype": spec.dtype}


def change(planned: Change) -> dict[str, Any]:
    """One line of a plan."""
    return {"expert": list(planned.expert), "host": planned.host, "what": planned.what, "why": planned.why}


def move(under_way: Move, now: float) -> dict[str, Any]:
    """One entry of /mesh/moves."""
    left_s = under_way.until - now if math.isfinite(under_way.until) else None
    return {"what": under_way.what, "for_s": now - under_way.since, "left_s": left_s, "note": under_way.note}


def host(state: HostState | None, member: Member, model: TimeModel | None, rate: float) -> dict[str, Any]:
    """One entry of /mesh/hosts."""
    running, reported = member.running, member.statistics
    entry: dict[str, Any] = {
        "id": running.info.id,
        "pool": running.pool,
        "node": running.node,
        "rack": running.rack,
        "pid": running.process_id,
        "address": running.info.address,
        "state": state.status.value if state else "gone",
        "slots": sum(state.slots) if state and state.slots else None,
        "replicas": None,
        "loading": None,
        "rate": rate,
        "launch_s": model.launch_s if model else None,
        "expert_s": model.expert_s if model else None,
        "row_s": model.row_s if model else None,
    }
    if state:
        statuses = [replica.status for replica in state.replicas.values()]
        entry["replicas"] = statuses.count(ReplicaStatus.READY)
        entry["loading"] = statuses.count(ReplicaStatus.LOADING)
    if reported:
        entry |= {"rows": int(reported.done.rows), "launches": int(reported.done.launches), "busy": member.busy}
    return entry
