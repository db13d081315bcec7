"""Where experts go: one pure function from loads, hosts and the current placement to the desired placement.

`plan` minimises, per layer, the time of the slowest host with the best split of every expert's load over its
replicas. It is deterministic, and sticky: what is good enough stays, and a plan made from its own result is the same.
It knows nothing of how replicas get to where it wants them, nor of what a slot costs to fill.
"""

from __future__ import annotations

from itertools import accumulate
from math import isfinite
from typing import TYPE_CHECKING

from expertmesh.control.planner.copies import deserved
from expertmesh.control.planner.draft import Draft, Layout
from expertmesh.control.planner.fleet import Fleet, fleet_for, survives
from expertmesh.control.planner.improving import improve, retire
from expertmesh.control.planner.layout import lay_out
from expertmesh.control.planner.reasons import changes
from expertmesh.control.planner.repair import repair
from expertmesh.control.planner.values import Change, HostSupply, Loads, Plan, PlanOptions, Replicas, Survives
from expertmesh.errors import ConfigError
from expertmesh.ids import ExpertId, HostId

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Change", "HostSupply", "Plan", "PlanOptions", "Survives", "plan"]

_DEFAULTS = PlanOptions()


def plan(
    loads: Loads,
    inventory: Sequence[HostSupply],
    current: Replicas | None = None,
    options: PlanOptions = _DEFAULTS,
) -> Plan:
    """The placement to have under `loads`, starting from `current`.

    Replicas in `current` on hosts that `inventory` does not list are gone. Raises ConfigError, one line that names the
    field and the fix, when the input makes no sense or not everything fits.
    """
    _check_loads(loads)
    fleet = fleet_for(inventory, sum(map(len, loads)), options)
    before = _kept(current or {}, loads, fleet)
    draft = Draft(fleet, loads, options.min_replicas, [list(layout) for layout in before])
    _lay_out_new(draft, options)
    repair(draft)
    _settle(draft, options)
    return _result(draft, before, inventory)


def _check_loads(loads: Loads) -> None:
    width = max(map(len, loads), default=0)
    for number, layer in enumerate(loads):
        if layer and len(layer) != width:
            raise ConfigError(f"loads: layer {number} has {len(layer)} experts and another has {width}; fill it up")
        for expert, load in enumerate(layer):
            if not isfinite(load) or load < 0:
                raise ConfigError(f"loads: expert {ExpertId(number, expert)} has {load}; it must be 0 or more")


def _kept(current: Replicas, loads: Loads, fleet: Fleet) -> list[Layout]:
    """The current placement on the hosts that are still there."""
    number = {host: i for i, host in enumerate(fleet.ids)}
    nobody: list[int] = []
    layers: list[Layout] = [[nobody] * len(layer) for layer in loads]
    for expert, hosts in current.items():
        if not (0 <= expert.layer < len(loads) and 0 <= expert.index < len(loads[expert.layer])):
            raise ConfigError(f"current: expert {expert} is not among the loads; use the placement of the same model")
        layers[expert.layer][expert.index] = sorted({number[host] for host in hosts if host in number})
    return layers


def _lay_out_new(draft: Draft, options: PlanOptions) -> None:
    """Lay out the layers of which nobody holds anything: each in its part of every host's free slots."""
    new = [number for number, layout in enumerate(draft.layers) if layout and not any(layout)]
    if not new:
        return
    fleet = draft.fleet
    free = [max(0, n) for n in draft.free]
    loads = [draft.loads[number] for number in new]
    lacking = sum(max(0, draft.min_replicas - len(hosts)) for layout in draft.layers if any(layout) for hosts in layout)
    spare = sum(free) - lacking - draft.min_replicas * sum(map(len, loads))
    counts = deserved(loads, fleet.num_working, draft.min_replicas, spare)
    wanted = list(accumulate(sum(of) for of in counts))
    for number, of, so_far in zip(new, counts, wanted, strict=True):
        # Up to here, hosts may fill the part of their slots that the layers so far want of all: rounded up, so that
        # it always suffices.
        quota = [-(-n * so_far // wanted[-1]) - (n - left) for n, left in zip(free, draft.free, strict=True)]
        draft.replace(number, lay_out(fleet, draft.loads[number], of, quota, draft.layers[number], options))


def _settle(draft: Draft, options: PlanOptions) -> None:
    """Improve and retire until neither changes anything: a plan made from the result will find nothing to do."""
    seen = [-1] * len(draft.layers)
    while any(at != draft.changes for at in seen):
        for number, layer in enumerate(draft.loads):
            if sum(layer) > 0 and seen[number] != draft.changes:
                while retire(draft, number) or improve(draft, number, options):
                    pass
            seen[number] = draft.changes


def _result(draft: Draft, before: list[Layout], inventory: Sequence[HostSupply]) -> Plan:
    fleet = draft.fleet
    ids = fleet.ids
    # Most experts have one host: sharing these values makes the result of a large model several times quicker to build.
    only = [((host,), {host: 1.0}) for host in ids]
    replicas: dict[ExpertId, tuple[HostId, ...]] = {}
    split: dict[ExpertId, dict[HostId, float]] = {}
    max_time = []
    for number, layout in enumerate(draft.layers):
        times = draft.times(number)
        max_time.append(times.slowest())
        for index, hosts in enumerate(layout):
            expert = ExpertId(number, index)
            if len(hosts) == 1:
                replicas[expert], split[expert] = only[hosts[0]]
            else:
                replicas[expert] = tuple(sorted([ids[host] for host in hosts]))
                split[expert] = {ids[host]: share for host, share in times.shares(index, hosts).items()}
    speed = sum(fleet.rate)
    reasons = changes(draft, before)
    return Plan(
        replicas=replicas,
        split=split,
        max_time=tuple(max_time),
        ideal=tuple(sum(layer) / speed if speed else 0.0 for layer in draft.loads),
        moves=sum(change.what == "add" for change in reasons),
        survives=survives(fleet, all(supply.rack for supply in inventory), (h for of in draft.layers for h in of)),
        reasons=reasons,
    )
