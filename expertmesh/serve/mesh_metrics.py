"""What /metrics says of the mesh behind a gateway: read from the controller's views at each scrape, and kept nowhere.

Knows what the views hold, not how they come about. Invariant: a view that cannot be had takes its figures along, so
that no figure outlives its view.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from expertmesh.errors import ExpertMeshError
from expertmesh.serve.backend import Backend

MOST_EXPERTS = 4096
"""Of a model with more experts, no figure per expert is given: they would be most of what Prometheus keeps."""
ANSWER_S = 5.0
"""Well within the time that Prometheus gives a scrape."""

_PREFIX = "expertmesh_"
_COUNTS = {
    "requests": "Requests sent to hosts",
    "hedges": "Requests sent to a second host because the first was late",
    "overtaken": "Requests that the second host answered first",
    "sent_again": "Requests whose host broke off, failed, or did not answer in time",
    "not_finite": "Replies with NaN or infinities in them",
    "double_checked": "Replies that were compared with a second host's",
}
"""Of what a router says of its exchanges, all that only grows."""

_Values = Iterable[tuple[Sequence[str], float]]
"""Figures by the values of their labels."""


class MeshMetrics(Collector):
    """Call `refresh` before each scrape of the registry."""

    def __init__(self, registry: CollectorRegistry, backend: Backend) -> None:
        self._backend = backend
        self._metrics: list[Metric] = []
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics

    async def refresh(self) -> None:
        """Ask the mesh. Never raises for want of an answer: `controller_up` is 0 then."""
        try:
            async with asyncio.timeout(ANSWER_S):
                hosts, routers, placement, load, moves = await asyncio.gather(
                    *(self._backend.mesh(view) for view in ("hosts", "routers", "placement", "load", "moves"))
                )
        except (ExpertMeshError, TimeoutError):
            self._metrics = [_gauge("controller_up", "Whether the mesh's controller answers", 0)]
            return
        self._metrics = [
            _gauge("controller_up", "Whether the mesh's controller answers", 1),
            *_of_hosts(hosts),
            *_of_routers(routers),
            *_of_placement(placement),
            *_of_load(load),
            _gauge("moves", "Loads, drops, starts and stops under way", len(moves["moves"])),
            _gauge("alarm", "Whether the control loop is stuck; /mesh/moves says why", bool(moves["alarm"])),
        ]


def _of_hosts(hosts: Sequence[dict[str, Any]]) -> Iterable[Metric]:
    count = Counter((host["pool"], host["state"]) for host in hosts)
    yield _family("hosts", "Hosts", ("pool", "state"), count.items())
    busy = [((host["id"],), host["busy"]) for host in hosts if "busy" in host]
    yield _family("host_busy", "Share of its time that a host computes", ("host",), busy)
    rows = [((host["id"],), host["rows"]) for host in hosts if "rows" in host]
    yield _counter("host_rows", "Rows that a host has computed", ("host",), rows)


def _of_routers(routers: Sequence[dict[str, Any]]) -> Iterable[Metric]:
    for name, what in _COUNTS.items():
        counts = [((router["id"],), router[name]) for router in routers]
        yield _counter(f"exchange_{name}", what, ("router",), counts)
    for name, what in (("running", "Choices that a router generates"), ("waiting", "Choices that wait in a router")):
        figures = [((router["id"],), router[name]) for router in routers]
        yield _family(f"router_{name}", what, ("router",), figures)
    avoided = [((router["id"],), len(router["avoided"])) for router in routers]
    yield _family("router_avoided_hosts", "Hosts that a router does not trust now", ("router",), avoided)


def _of_placement(placement: dict[str, Any]) -> Iterable[Metric]:
    yield _gauge("placement_epoch", "Epoch of the current placement", placement["epoch"])
    replicas = sum(len(host["experts"]) for host in placement["hosts"])
    yield _gauge("replicas", "Replicas that the current placement names", replicas)


def _of_load(load: dict[str, Any]) -> Iterable[Metric]:
    if load["imbalance"] is not None:
        what = "The slowest host's time over the ideal, mean over layers; 1 is perfect"
        yield _gauge("imbalance", what, load["imbalance"])
    layers: list[list[float]] = load["per_second"]
    if sum(map(len, layers)) <= MOST_EXPERTS:
        loads = [((str(i), str(j)), rows) for i, layer in enumerate(layers) for j, rows in enumerate(layer)]
        yield _family("expert_load", "An expert's rows per second, smoothed", ("layer", "expert"), loads)


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(_PREFIX + name, what, value=value)


def _family(name: str, what: str, labels: Sequence[str], values: _Values) -> GaugeMetricFamily:
    family = GaugeMetricFamily(_PREFIX + name, what, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family


def _counter(name: str, what: str, labels: Sequence[str], values: _Values) -> CounterMetricFamily:
    family = CounterMetricFamily(_PREFIX + name, what, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family
