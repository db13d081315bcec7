"""The sides that `bench balance` compares: each plans a placement from loads, and splits a batch over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from expertmesh.bench import eplb
from expertmesh.control.planner import HostSupply, PlanOptions, plan
from expertmesh.levelling import Levels
from expertmesh.moe.split import split_rows
from expertmesh.placement import HostInfo, Placement, TimeModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from expertmesh.ids import ExpertId, HostId
    from expertmesh.placement import LayerTable

OPTIONS = PlanOptions(landing_slots=0)
"""EPLB needs all slots, so we may use them too."""


class Side(Protocol):
    """One way to balance a model of some layers on the hosts of an inventory."""

    def plan(self, loads_LE: Sequence[ArrayLike]) -> int:
        """Place the experts for these loads; how many replicas have to be loaded that were not there before."""
        ...

    def time(self, layer: int, rows_E: NDArray[np.int64]) -> float:
        """Seconds that the slowest host takes for a batch of one layer."""
        ...


class EvenSplit:
    """A placement whose replicas share each expert's rows evenly, one planned without memory."""

    def __init__(self, inventory: Sequence[HostSupply], *, replicates: bool) -> None:
        """With EPLB's replicas, or with none: experts dealt out in order, as many to each host."""
        self._rate_H = np.array([supply.rate for supply in inventory])
        self._slots = min(supply.slots for supply in inventory)
        self._replicates = replicates
        self._layers: list[list[list[int]]] = []

    def plan(self, loads_LE: Sequence[ArrayLike]) -> int:
        before = self._layers
        num_hosts = len(self._rate_H)
        self._layers = []
        for loads in loads_LE:
            loads_E = np.asarray(loads, dtype=float)
            if self._replicates:
                slots = self._slots // len(loads_LE)
                self._layers.append(eplb.place(loads_E.tolist(), num_hosts, slots))
            else:
                self._layers.append([of.tolist() for of in np.array_split(np.arange(len(loads_E)), num_hosts)])
        return sum(
            len(set(of)) - (len(set(of) & set(before[layer][host])) if before else 0)
            for layer, hosts in enumerate(self._layers)
            for host, of in enumerate(hosts)
        )

    def time(self, layer: int, rows_E: NDArray[np.int64]) -> float:
        hosts = self._layers[layer]
        share_E = rows_E / np.bincount(np.concatenate(hosts), minlength=len(rows_E))
        work_H = np.array([share_E[of].sum() for of in hosts])
        return float((work_H / self._rate_H).max())


class Ours:
    """The planner, which starts from what is there, and the fast split."""

    def __init__(self, inventory: Sequence[HostSupply]) -> None:
        self._inventory = inventory
        self._rate_H = np.array([supply.rate for supply in inventory])
        self._hosts = tuple(
            HostInfo(id=supply.host, address="", time_model=TimeModel(row_s=1 / supply.rate)) for supply in inventory
        )
        self._replicas: Mapping[ExpertId, tuple[HostId, ...]] | None = None

    def plan(self, loads_LE: Sequence[ArrayLike]) -> int:
        loads = [np.asarray(loads, dtype=float).tolist() for loads in loads_LE]
        planned = plan(loads, self._inventory, self._replicas, OPTIONS)
        self._replicas = planned.replicas
        self._placement = Placement(
            epoch=1, hosts=self._hosts, num_experts=tuple(map(len, loads)), replicas=planned.replicas
        )
        return planned.moves

    def table(self, layer: int) -> LayerTable:
        return self._placement.layers[layer]

    def time(self, layer: int, rows_E: NDArray[np.int64]) -> float:
        table = self.table(layer)
        models = [host.time_model for host in self._hosts]
        counts_EM = split_rows(rows_E, table, [0.0] * len(models), models)
        work_H = np.bincount(table.host_EM.ravel(), counts_EM.ravel(), len(models))
        return float((work_H / self._rate_H).max())

    def least_time(self, layer: int, rows_E: NDArray[np.int64]) -> float:
        """What no split can beat: the optimum of the linear program over all fractional splits, with our placement."""
        table = self.table(layer)
        hosts = [of[:n] for of, n in zip(table.host_EM.tolist(), table.num_replicas_E.tolist(), strict=True)]
        levels = Levels(rows_E.tolist(), hosts, [0.0] * len(self._hosts), self._rate_H.tolist())
        levels.settle()
        return float((np.array(levels.load) / self._rate_H).max())


def ideal_time(rows_E: NDArray[np.int64], inventory: Sequence[HostSupply]) -> float:
    """All rows over all rates."""
    return float(rows_E.sum()) / sum(supply.rate for supply in inventory)


def least_time(rows_E: NDArray[np.int64], inventory: Sequence[HostSupply]) -> float:
    """What no placement can beat: k experts are on at most k + spare hosts, and these on the fastest at best."""
    spare = sum(supply.slots for supply in inventory) - len(rows_E)
    speed = np.cumsum(sorted((supply.rate for supply in inventory), reverse=True))
    heaviest = np.cumsum(np.sort(rows_E)[::-1])
    hosts = np.minimum(np.arange(1, len(rows_E) + 1) + spare, len(speed))
    return float(max(*(heaviest / speed[hosts - 1]), ideal_time(rows_E, inventory)))
