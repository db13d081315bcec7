"""What the control plane would have done with a trace: the production planner, load meter and split on a model fleet.

Three strategies see the same load: "static" keeps its first placement, made when no load is known; "once" plans on the
load of its first interval and never again; "ours" plans at every interval, as the controller does. A fleet is modelled
by its time models and by how long copies of experts take. What counts is the slowest host of each layer, for which
every token waits, over the time that hosts would need if all of them held every expert.

Knows nothing of Ray, gRPC or torch. Its invariant: it decides nothing itself.

Shapes: E experts of the layer, M replicas at most, H hosts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from expertmesh.control.load import LoadMeter
from expertmesh.control.planner import HostSupply, PlanOptions, plan
from expertmesh.errors import ConfigError, TraceError
from expertmesh.moe.split import split_rows
from expertmesh.placement import HostInfo, Placement
from expertmesh.trace.fleet import ideal_s
from expertmesh.trace.windows import Window, windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from expertmesh.clock import Clock
    from expertmesh.ids import ExpertId, HostId
    from expertmesh.trace.fleet import ModelHost
    from expertmesh.trace.format import Record, TraceHeader

PLANS: dict[str, float] = {"static": 0, "once": 1, "ours": float("inf")}
"""The strategies, and how often each may plan after its first placement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions:
    """How time passes and what things cost. Raises ConfigError for what makes no sense."""

    window_s: float = 10.0
    plan_every_s: float = 60.0
    half_life_s: float = 30.0
    """Of the load meter."""
    batch_tokens: int = 512
    """Tokens of one exchange; each is drawn from its window's load."""
    replica_bytes: int = 44_000_000
    copy_bytes_per_s: float = 1e9
    """At which a host loads replicas, one after the other; the new placement holds once all of them are loaded."""
    sample_layers: int = 8
    """In each window so many layers are split and timed, in turn."""
    seed: int = 0
    planner: PlanOptions = field(default_factory=PlanOptions)

    def __post_init__(self) -> None:
        for name in ("window_s", "plan_every_s", "half_life_s", "batch_tokens", "copy_bytes_per_s", "sample_layers"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: {getattr(self, name)} is not above 0")
        if self.replica_bytes < 0:
            raise ConfigError(f"replica_bytes: {self.replica_bytes} is below 0")


def simulate(
    header: TraceHeader,
    records: Iterable[Record],
    hosts: Sequence[ModelHost],
    options: SimulationOptions,
    clock: Clock,
    report: Callable[[Window], None] = lambda _: None,
) -> dict[str, Any]:
    """Run all strategies over a trace: plain JSON values, with a series entry for every window that has load.

    `report` is told of each window as it is done. Raises ConfigError when the experts do not fit into the hosts'
    slots, TraceError when the trace holds no load.
    """
    started_s = clock.monotonic()
    fleet = _Fleet(header, hosts, options)
    first = plan([[1.0] * count for count in header.num_experts], fleet.supplies, None, options.planner).replicas
    strategies = [_Strategy(name, fleet, first, limit) for name, limit in PLANS.items()]
    meter = LoadMeter(header.num_experts, half_life_s=options.half_life_s)
    meter.tick(0.0)
    rng = np.random.default_rng(options.seed)
    times_s: list[float] = []
    plan_s = 0.0
    for number, window in enumerate(windows(records, header.num_experts, options.window_s)):
        if any(rows_E.any() for rows_E in window.rows):
            times_s.append(window.start_s)
            batches = fleet.draw(window, number, rng)
            for strategy in strategies:
                strategy.time(window.start_s + options.window_s / 2, batches)
        for layer, rows_E in enumerate(window.rows):
            meter.count(layer, rows_E)
        end_s = window.start_s + options.window_s
        meter.tick(end_s)
        before_s = clock.monotonic()
        for strategy in strategies:
            strategy.replan(end_s, meter)
        plan_s += clock.monotonic() - before_s
        report(window)
    if not times_s:
        raise TraceError("the trace holds no load: there is nothing to simulate")
    sampled = min(options.sample_layers, len(header.num_experts))
    return {
        "trace": {"model": header.model, "layers": len(header.num_experts), "experts": sum(header.num_experts)},
        "hosts": len(hosts),
        "slots": sum(host.slots for host in hosts),
        "windows": len(times_s),
        "window_s": options.window_s,
        "simulated_s": times_s[-1] + options.window_s,
        "evaluated": f"{sampled} of {len(header.num_experts)} layers in each window, in turn",
        "strategies": {strategy.name: strategy.summary() for strategy in strategies},
        "series": {"start_s": times_s} | {strategy.name: strategy.series() for strategy in strategies},
        "plan_s": plan_s,
        "wall_s": clock.monotonic() - started_s,
    }


@dataclass(frozen=True, slots=True)
class _Batch:
    """One exchange's rows in one layer, and the time that it would take if every host held every expert."""

    layer: int
    rows_E: NDArray[np.int64]
    ideal_s: float


class _Fleet:
    """What the strategies share: the hosts, and how long they take."""

    def __init__(self, header: TraceHeader, hosts: Sequence[ModelHost], options: SimulationOptions) -> None:
        self.header = header
        self.options = options
        self.infos = tuple(HostInfo(id=host.host, address="", time_model=host.time_model) for host in hosts)
        self._models = [host.time_model for host in hosts]
        self._launch_s_H = np.array([model.launch_s for model in self._models])
        self._expert_s_H = np.array([model.expert_s for model in self._models])
        self._row_s_H = np.array([model.row_s for model in self._models])
        self._ideal_s: dict[int, float] = {}
        self._batch_rows = options.batch_tokens * header.top_k
        # Rates are those of the mean launch, as in the controller: a layer's replicas and rows, spread evenly.
        replicas = max(1.0, sum(host.slots for host in hosts) / len(header.num_experts))
        used = min(len(hosts), replicas)
        rows, experts = self._batch_rows / used, min(replicas / used, *header.num_experts)
        self.supplies = [
            HostSupply(
                host=host.host,
                slots=host.slots,
                rate=rows / host.time_model.seconds(rows, experts),
                node=host.node,
                rack=host.rack,
            )
            for host in hosts
        ]

    def draw(self, window: Window, number: int, rng: np.random.Generator) -> list[_Batch]:
        """An exchange of this window in each of the layers whose turn it is among those that have load."""
        loaded = [layer for layer, rows_E in enumerate(window.rows) if rows_E.any()]
        count = min(self.options.sample_layers, len(loaded))
        batches = []
        for turn in range(number * count, (number + 1) * count):
            layer = loaded[turn % len(loaded)]
            share_E = window.rows[layer] / window.rows[layer].sum()
            rows_E = rng.multinomial(self._batch_rows, share_E)
            batches.append(_Batch(layer, rows_E, self._ideal(int(np.count_nonzero(rows_E)))))
        return batches

    def _ideal(self, num_experts: int) -> float:
        if num_experts not in self._ideal_s:
            self._ideal_s[num_experts] = ideal_s(self._models, self._batch_rows, num_experts)
        return self._ideal_s[num_experts]

    def slowest_s(self, batch: _Batch, placement: Placement) -> float:
        """How long the batch takes on this placement, split as routers do."""
        table = placement.layers[batch.layer]
        num_hosts = len(self._models)
        counts_EM = split_rows(batch.rows_E, table, [0.0] * num_hosts, self._models)
        host_X, counts_X = table.host_EM.reshape(-1), counts_EM.reshape(-1)
        rows_H = np.bincount(host_X, counts_X, num_hosts)
        experts_H = np.bincount(host_X, counts_X > 0, num_hosts)
        seconds_H = self._launch_s_H + experts_H * self._expert_s_H + rows_H * self._row_s_H
        return float(seconds_H.max(where=rows_H > 0, initial=0.0))


class _Strategy:
    """One way to run the fleet, and what came of it."""

    def __init__(
        self, name: str, fleet: _Fleet, first: Mapping[ExpertId, tuple[HostId, ...]], max_plans: float
    ) -> None:
        self.name = name
        self._fleet = fleet
        self._max_plans = max_plans
        self._next_plan_s = fleet.options.plan_every_s
        self._loading: tuple[float, Mapping[ExpertId, tuple[HostId, ...]]] | None = None
        self._imbalance: list[float] = []
        self._slowest_s: list[float] = []
        self._moved: list[int] = []
        self._plans = 0
        self._moves_since = 0
        self._replicas = [len(hosts) for hosts in first.values()]
        self._adopt(first)

    def _adopt(self, replicas: Mapping[ExpertId, tuple[HostId, ...]]) -> None:
        self._placement = Placement(
            epoch=self._plans + 1,
            hosts=self._fleet.infos,
            num_experts=self._fleet.header.num_experts,
            replicas=replicas,
        )
        counts = [len(hosts) for hosts in replicas.values()]
        self._replicas = [min(*counts, *self._replicas), max(*counts, *self._replicas)]

    def time(self, now_s: float, batches: Sequence[_Batch]) -> None:
        """Note how long the exchanges of a window take, of which now is the middle."""
        if self._loading and now_s >= self._loading[0]:
            self._adopt(self._loading[1])
            self._loading = None
        slowest_s = [self._fleet.slowest_s(batch, self._placement) for batch in batches]
        ideal_s = [batch.ideal_s for batch in batches]
        self._imbalance.append(float(np.mean(np.divide(slowest_s, ideal_s))))
        self._slowest_s.append(float(np.mean(slowest_s)))
        self._moved.append(self._moves_since)
        self._moves_since = 0

    def replan(self, now_s: float, meter: LoadMeter) -> None:
        """Plan when it is time to and no copy is under way."""
        if self._loading or now_s < self._next_plan_s or self._plans >= self._max_plans:
            return
        self._next_plan_s = now_s + self._fleet.options.plan_every_s
        current = self._placement.replicas
        decided = plan(meter.loads(), self._fleet.supplies, current, self._fleet.options.planner)
        self._plans += 1
        self._moves_since += decided.moves
        if decided.replicas != current:
            copies = Counter(
                host for expert, hosts in decided.replicas.items() for host in set(hosts).difference(current[expert])
            )
            options = self._fleet.options
            copy_s = max(copies.values(), default=0) * options.replica_bytes / options.copy_bytes_per_s
            self._loading = (now_s + copy_s, decided.replicas)

    def series(self) -> dict[str, list[float]]:
        return {"imbalance": self._imbalance, "moves": list(self._moved)}

    def summary(self) -> dict[str, float]:
        moves = sum(self._moved) + self._moves_since
        return {
            "imbalance_mean": float(np.mean(self._imbalance)),
            "imbalance_p50": float(np.quantile(self._imbalance, 0.5)),
            "imbalance_p99": float(np.quantile(self._imbalance, 0.99)),
            "slowest_s_mean": float(np.mean(self._slowest_s)),
            "plans": self._plans,
            "moves": moves,
            "bytes_moved": moves * self._fleet.options.replica_bytes,
            "replicas_min": self._replicas[0],
            "replicas_max": self._replicas[1],
        }
