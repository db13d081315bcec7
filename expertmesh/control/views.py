"""What the controller knows, as others want to see it. Pure."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from expertmesh.control.planner import HostSupply
from expertmesh.control.state import ReplicaStatus
from expertmesh.control.wanted import Supply
from expertmesh.placement import TimeModel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from expertmesh.control.cluster import RunningHost
    from expertmesh.control.members import Member
    from expertmesh.control.planner import Change
    from expertmesh.control.progress import Move
    from expertmesh.control.state import HostState


def supply(state: HostState, running: RunningHost, rate: float) -> Supply:
    """A host as the planner sees it."""
    host = HostSupply(host=state.id, slots=0, rate=rate, node=running.node, rack=running.rack)
    return Supply(slots=state.slots, host=host)


def usual(models: Iterable[TimeModel]) -> TimeModel:
    """What an unmeasured host is taken for: the median of the measured ones."""
    known = list(models)
    if not known:
        return TimeModel()
    return TimeModel(
        statistics.median(model.launch_s for model in known), statistics.median(model.row_s for model in known)
    )


def differ(measured: TimeModel, told: TimeModel, part: float) -> bool:
    """Whether two time models differ by more than `part` where it counts."""
    return abs(measured.row_s - told.row_s) > part * told.row_s


def change(planned: Change) -> dict[str, Any]:
    """One line of a plan."""
    return {"expert": list(planned.expert), "host": planned.host, "what": planned.what, "why": planned.why}


def move(under_way: Move, now: float) -> dict[str, Any]:
    """One entry of /mesh/moves."""
    left_s = under_way.until - now if math.isfinite(under_way.until) else None
    return {"what": under_way.what, "for_s": now - under_way.since, "left_s": left_s, "note": under_way.note}


def host(state: HostState | None, member: Member, model: TimeModel | None) -> dict[str, Any]:
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
        "rate": 1 / model.row_s if model and model.row_s else None,
        "launch_s": model.launch_s if model else None,
    }
    if state:
        statuses = [replica.status for replica in state.replicas.values()]
        entry["replicas"] = statuses.count(ReplicaStatus.READY)
        entry["loading"] = statuses.count(ReplicaStatus.LOADING)
    if reported:
        entry |= {"rows": reported.rows, "launches": reported.launches, "busy": member.busy}
    return entry
