"""What the planner takes and gives. Values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from expertmesh.ids import ExpertId, HostId

Loads = Sequence[Sequence[float]]
"""loads[layer][expert] in rows per second, or any other unit: only their ratio to `HostSupply.rate` matters. A layer
without experts of the planned shape is empty; all others have the same number of experts."""

Replicas = Mapping[ExpertId, tuple[HostId, ...]]
"""Who holds each expert, hosts in ascending order."""

Survives = Literal["rack", "node", "host", "nothing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSupply:
    """What one host offers. A sequence of these is an inventory; its order does not matter."""

    host: HostId
    slots: int
    rate: float = 1.0
    """Rows per second, measured at the batch sizes seen. A host with rate 0 gets nothing if that can be avoided."""
    node: str = ""
    """"" is a node of its own."""
    rack: str = ""
    """"" is unknown; racks count only when every host's is known."""
    cost: float = 0.0
    """Price of keeping a replica here, in any unit. Cold experts go where it is low; ties go to the cheaper host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the planner weighs."""

    min_replicas: int = 1
    """Every expert has at least this many replicas, on distinct hosts; from 2 on, they span the widest domain that has
    room: racks, else nodes, else hosts."""
    landing_slots: int = 1
    """Slots left empty on each host, so that a move has somewhere to land; fewer when not everything fits otherwise."""
    min_gain: float = 0.05
    """A layer stays as it is unless its slowest host's time falls by at least this part."""
    move_cost: float = 0.1
    """What loading as many replicas as a layer has experts must gain on top of `min_gain`; fewer replicas, less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One replica more or less than before, and why: a line for the decision log."""

    expert: ExpertId
    host: HostId
    what: Literal["add", "retire"]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A desired placement, with what it is worth."""

    replicas: Replicas
    split: Mapping[ExpertId, Mapping[HostId, float]]
    """Per expert the share of its load that each of its replicas takes for `max_time`; shares sum to 1."""
    max_time: tuple[float, ...]
    """Per layer, the slowest host's seconds per second of load: 1 is a host that is always busy. Infinite when an
    expert with load is only on hosts of rate 0."""
    ideal: tuple[float, ...]
    """Per layer, total load over total rate: no placement is faster."""
    moves: int
    """Replicas to load, that is those that `current` has not got."""
    survives: Survives
    """The largest domain any one of which can fail, and any smaller one, while every expert still has a replica."""
    reasons: tuple[Change, ...]
    """One for each replica added or retired, ordered by expert and host. A host that is gone retires nothing."""
