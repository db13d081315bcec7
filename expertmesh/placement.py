"""Which host holds which expert, as one immutable value with an epoch.

The control plane makes placements and publishes each one whole; the token plane only reads them. A placement with a
greater epoch replaces any other, so lost or reordered messages converge. A placement names a replica only once it is
loaded and ready.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from expertmesh.errors import ProtocolError
from expertmesh.ids import MAX_EXPERTS, MAX_LAYERS, ExpertId, HostId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


_MOST_RESTRICTED = 4096
"""Tables of a placement that are kept for hosts that are away."""


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
    bucket_EM: NDArray[np.int64]
    """Each replica's number among the layer's, counted host by host and within a host expert by expert; -1: none."""
    host_B: NDArray[np.int64]
    """By that number, its index into `Placement.hosts`."""
    expert_B: list[int]
    """And its expert."""


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
            tables.append(self._table_of(counts, table))
        return tuple(tables)

    def _table_of(self, num_replicas_E: NDArray[np.int64], host_EM: NDArray[np.int64]) -> LayerTable:
        num_experts = len(num_replicas_E)
        is_replica_EM = np.arange(host_EM.shape[1]) < num_replicas_E[:, None]
        keys = (host_EM * num_experts + np.arange(num_experts)[:, None])[is_replica_EM]
        order = np.argsort(keys)
        bucket_EM = np.full(host_EM.shape, -1)
        bucket_EM[is_replica_EM] = np.argsort(order)
        host_B, expert_B = np.divmod(keys[order], num_experts)
        return LayerTable(num_replicas_E, host_EM, bucket_EM, host_B, expert_B.tolist())

    @cached_property
    def time_models(self) -> tuple[TimeModel, ...]:
        """How long each of `hosts` takes."""
        return tuple(host.time_model for host in self.hosts)

    def table(
        self, layer: int, failed: frozenset[HostId] = frozenset(), avoided: frozenset[HostId] = frozenset()
    ) -> LayerTable:
        """A layer's table as if hosts in `failed` held nothing, and those in `avoided` nothing that others hold too."""
        if not self.hosts or (not failed and not avoided):
            return self.layers[layer]
        key = (layer, failed, avoided)
        table = self._restricted.get(key)
        if table is None:
            if len(self._restricted) >= _MOST_RESTRICTED:
                self._restricted.clear()
            table = self._restricted[key] = self._restrict(self.layers[layer], failed, avoided)
        return table

    @cached_property
    def _restricted(self) -> dict[tuple[int, frozenset[HostId], frozenset[HostId]], LayerTable]:
        """Tables made before: while a host is away, every exchange asks for the same ones."""
        return {}

    def _restrict(self, table: LayerTable, failed: frozenset[HostId], avoided: frozenset[HostId]) -> LayerTable:
        most = table.host_EM.shape[1]
        is_failed_H = np.array([host.id in failed for host in self.hosts])
        is_avoided_H = np.array([host.id in avoided for host in self.hosts])
        left_EM = (np.arange(most) < table.num_replicas_E[:, None]) & ~is_failed_H[table.host_EM]
        liked_EM = left_EM & ~is_avoided_H[table.host_EM]
        left_EM = np.where(liked_EM.any(axis=1, keepdims=True), liked_EM, left_EM)
        order_EM = np.argsort(~left_EM, axis=1, kind="stable")
        host_EM = np.take_along_axis(np.where(left_EM, table.host_EM, 0), order_EM, axis=1)
        counts = left_EM.sum(axis=1)
        return self._table_of(counts, np.ascontiguousarray(host_EM[:, : max(1, int(counts.max(initial=0)))]))

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
        """The inverse of `to_json` (replicas come in the order of hosts). Raises ProtocolError for anything else."""
        try:
            placement = Placement._from_json(value)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ProtocolError(f"no placement: {type(error).__name__}: {str(error)[:100]!r}") from error
        placement._check()
        return placement

    def _check(self) -> None:
        """Raise ProtocolError for what `to_json` cannot have made."""
        if len(self.num_experts) > MAX_LAYERS or not all(0 < number <= MAX_EXPERTS for number in self.num_experts):
            raise ProtocolError(f"num_experts: at most {MAX_LAYERS} layers, of 1 to {MAX_EXPERTS} experts each")
        if len({host.id for host in self.hosts}) != len(self.hosts):
            raise ProtocolError("hosts: each must have an id of its own")
        for expert, holders in self.replicas.items():
            if not (0 <= expert.layer < len(self.num_experts) and 0 <= expert.index < self.num_experts[expert.layer]):
                raise ProtocolError(f"experts: {expert} is not among those of num_experts")
            if len(set(holders)) != len(holders):
                raise ProtocolError(f"experts: {holders[0]} holds {expert} more than once")

    @staticmethod
    def _from_json(value: Mapping[str, Any]) -> Placement:
        hosts = tuple(
            HostInfo(
                id=HostId(_text(host["id"])),
                address=_text(host["address"]),
                socket=_text(host["socket"]),
                time_model=TimeModel(**{name: _seconds(host["time_model"][name]) for name in _TIMES}),
            )
            for host in value["hosts"]
        )
        replicas: dict[ExpertId, tuple[HostId, ...]] = {}
        for host in value["hosts"]:
            for layer, index in host["experts"]:
                expert = ExpertId(_integer(layer), _integer(index))
                replicas[expert] = (*replicas.get(expert, ()), HostId(host["id"]))
        num_experts = tuple(_integer(number) for number in value["num_experts"])
        return Placement(epoch=_integer(value["epoch"]), hosts=hosts, num_experts=num_experts, replicas=replicas)


_TIMES = ("launch_s", "row_s", "expert_s")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is none")
    return value


def _integer(value: object) -> int:
    if type(value) is not int:
        raise TypeError("an integer is none")
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise TypeError("a time is none")
    return float(value)
