"""The planner applied to a whole model, whose layers may have experts of different shapes. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from expertmesh.control.capacity import missing_slots
from expertmesh.control.detours import around
from expertmesh.control.planner import Change, HostSupply, PlanOptions, plan
from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from expertmesh.control.planner import Plan
    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.ids import ExpertId, HostId


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """What one host offers: its slots per shape of experts, and the rest as in `HostSupply`."""

    slots: tuple[int, ...]
    host: HostSupply


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the planner wants, over all shapes."""

    replicas: Mapping[ExpertId, tuple[HostId, ...]]
    imbalance: float
    """The slowest host's time over the ideal, the mean over layers that have load; 1 is perfect."""
    survives: str
    changes: tuple[Change, ...]

    @property
    def num_added(self) -> int:
        return sum(change.what == "add" for change in self.changes)

    @property
    def num_retired(self) -> int:
        return len(self.changes) - self.num_added


def plan_experts(
    configuration: HostConfiguration,
    hosts: Sequence[Supply],
    loads: Sequence[Sequence[float]],
    current: Mapping[ExpertId, tuple[HostId, ...]],
    options: PlanOptions,
    banned: Collection[tuple[ExpertId, HostId]] = (),
) -> Wanted:
    """Plan every shape of experts on its own: shapes share no slots, and a layer has one shape.

    `banned` names experts with hosts that cannot have them just now: others are taken where there are any. Loads that
    are all 0 are taken to be all equal. Raises ConfigError when something does not fit.
    """
    _check_room(configuration, hosts, options.min_replicas)
    replicas: dict[ExpertId, tuple[HostId, ...]] = {}
    changes: list[Change] = []
    ratios: list[float] = []
    survives = []
    for shape in range(len(configuration.specs)):
        of_shape = [
            (list(layer) if any(layer) else [1.0] * len(layer)) if configuration.layer_specs[number] == shape else []
            for number, layer in enumerate(loads)
        ]
        inventory = [replace(supply.host, slots=supply.slots[shape]) for supply in hosts]
        held = {e: at for e, at in current.items() if configuration.layer_specs[e.layer] == shape}
        planned = plan(of_shape, inventory, held, options)
        of_plan = around(planned.replicas, banned, {supply.host.host: supply.slots[shape] for supply in hosts})
        replicas |= of_plan
        changes += _with_detours(planned, of_plan, held)
        survives.append(planned.survives)
        ratios += [slow / ideal for slow, ideal in zip(planned.max_time, planned.ideal, strict=True) if ideal]
    order = ("nothing", "host", "node", "rack")
    return Wanted(
        replicas=replicas,
        imbalance=sum(ratios) / len(ratios) if ratios else 1.0,
        survives=min(survives, key=order.index),
        changes=tuple(changes),
    )


def _with_detours(
    planned: Plan, replicas: Mapping[ExpertId, tuple[HostId, ...]], held: Mapping[ExpertId, tuple[HostId, ...]]
) -> list[Change]:
    """The changes that lead to `replicas`, which differ from the planned ones in what was banned."""
    changes = [
        change
        for change in planned.reasons
        if (change.what == "add") == (change.host in replicas.get(change.expert, ()))
    ]
    for expert, hosts in replicas.items():
        if hosts is planned.replicas[expert] or hosts == planned.replicas[expert]:
            continue
        told = {change.host for change in changes if change.expert == expert}
        before = held.get(expert, ())
        why = f"it cannot be on {', '.join(sorted(set(planned.replicas[expert]) - set(hosts)))} now"
        changes += [
            Change(expert=expert, host=host, what="add" if host in hosts else "retire", why=why)
            for host in sorted(set(hosts) ^ set(before))
            if host not in told
        ]
    return changes


def _check_room(configuration: HostConfiguration, hosts: Sequence[Supply], min_replicas: int) -> None:
    """Raises ConfigError, saying how much is missing, when the slots do not suffice."""
    num_experts = [configuration.num_experts(shape) for shape in range(len(configuration.specs))]
    lacking = missing_slots([supply.slots for supply in hosts], num_experts, min_replicas)
    for spec, total, missing in zip(configuration.specs, num_experts, lacking, strict=True):
        if missing:
            need = total * min_replicas
            raise ConfigError(
                f"the pools are too small: {need} slots are needed ({total} experts of {spec.num_bytes:,} bytes, "
                f"{min_replicas} replicas of each) and {need - missing} are there; "
                f"{missing * spec.num_bytes:,} bytes of memory are missing"
            )
