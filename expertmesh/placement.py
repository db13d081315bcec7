"""Which host holds which expert, as one immutable value with an epoch.

The control plane makes placements and publishes each one whole; the token plane only reads them. A placement with a
greater epoch replaces any other, so lost or reordered messages converge. A placement names a replica only once it is
loaded and ready.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from expertmesh.ids import ExpertId, HostId

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TimeModel:
    """How long a host takes, as measured: so much for a launch, for each distinct expert in it, and for each row."""

    launch_s: float = 0.0
    row_s: float = 1.0
    expert_s: float = 0.0
    """What reading one more expert's weights costs: at few rows, most of the time."""

    def seconds(self, rows: float, experts: float) -> float:
        """Of one launch."""
        return self.launch_s + experts * self.expert_s + rows * self.row_s


@dataclass(frozen=True, slots=True, kw_only=True)
class HostInfo:
    """What a router must know of a host to use it."""

    id: HostId
    address: str
    """host:port of its gRPC service."""
    socket: str = ""
    """Name of its local socket, for routers on the same machine; "" when it has none."""
    time_model: TimeModel = TimeModel()
    """Until measured, all hosts are taken to be alike."""


@dataclass(frozen=True, slots=True)
class LayerTable:
    """One layer of a placement as arrays. E experts, M the most replicas that any of them has."""

    num_replicas_E: NDArray[np.int64]
    host_EM: NDArray[np.int64]
    """Indices into `Placement.hosts`; unused entries are 0."""
    key_EM: NDArray[np.integer]
    """host * E + expert: one number for a replica. Of 16 bits where that will do, for those numpy sorts fastest."""
    is_complete: bool
    """Whether every expert has a replica."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Immutable map expert -> replicas.

    `replicas[e]` names distinct hosts, all of them in `hosts`; its order is part of the value, for the split of an
    expert's rows over its replicas goes by it.
    """

    epoch: int
    hosts: tuple[HostInfo, ...]
    num_experts: tuple[int, ...]
    """Per MoE layer, how many experts the model has (some may have no replica at the moment)."""
    replicas: Mapping[ExpertId, tuple[HostId, ...]] = field(repr=False)

    @cached_property
    def layers(self) -> tuple[LayerTable, ...]:
        """Per layer, the table that dispatch plans are made from."""
        position = {host.id: i for i, host in enumerate(self.hosts)}
        tables = []
        for layer, num_experts in enumerate(self.num_experts):
            of_expert = [self.replicas.get(ExpertId(layer, index), ()) for index in range(num_experts)]
            counts = np.array([len(hosts) for hosts in of_expert], dtype=np.int64)
            table = np.zeros((num_experts, max(1, int(counts.max(initial=0)))), dtype=np.int64)
            for index, hosts in enumerate(of_expert):
                table[index, : len(hosts)] = [position[host] for host in hosts]
            keys = table * num_experts + np.arange(num_experts)[:, None]
            fits = len(self.hosts) * num_experts <= np.iinfo(np.int16).max
            tables.append(LayerTable(counts, table, keys.astype(np.int16) if fits else keys, bool(counts.all())))
        return tuple(tables)

    @cached_property
    def time_models(self) -> tuple[TimeModel, ...]:
        """How long each of `hosts` takes."""
        return tuple(host.time_model for host in self.hosts)

    def without(self, hosts: Collection[HostId]) -> Placement:
        """The same placement and epoch as if `hosts` held nothing."""
        replicas = {
            expert: tuple(host for host in holders if host not in hosts) for expert, holders in self.replicas.items()
        }
        return Placement(epoch=self.epoch, hosts=self.hosts, num_experts=self.num_experts, replicas=replicas)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values: hosts with their address and their [layer, expert] pairs."""
        held: dict[HostId, list[list[int]]] = {host.id: [] for host in self.hosts}
        for expert in sorted(self.replicas):
            for host in self.replicas[expert]:
                held[host].append([expert.layer, expert.index])
        hosts = [
            {
                "id": host.id,
                "address": host.address,
                "socket": host.socket,
                "time_model": dataclasses.asdict(host.time_model),
                "experts": held[host.id],
            }
            for host in self.hosts
        ]
        return {"epoch": self.epoch, "num_experts": list(self.num_experts), "hosts": hosts}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Placement:
        """The inverse of `to_json` (replicas come in the order of hosts)."""
        hosts = tuple(
            HostInfo(
                id=HostId(host["id"]),
                address=host["address"],
                socket=host["socket"],
                time_model=TimeModel(**host["time_model"]),
            )
            for host in value["hosts"]
        )
        replicas: dict[ExpertId, tuple[HostId, ...]] = {}
        for host in value["hosts"]:
            for layer, index in host["experts"]:
                expert = ExpertId(layer, index)
                replicas[expert] = (*replicas.get(expert, ()), HostId(host["id"]))
        return Placement(epoch=value["epoch"], hosts=hosts, num_experts=tuple(value["num_experts"]), replicas=replicas)
