"""A mesh over real host processes, its controller in this process, under steady load whose answers are checked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from expertmesh.checkpoint.recipe import CheckpointIndex
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.config import MeshConfig, PoolSection
from expertmesh.control.controller import Controller
from expertmesh.errors import ExpertMeshError
from expertmesh.moe.exchange import Exchange
from expertmesh.testing.processes import ProcessCluster
from expertmesh.transport.grpc_control import GrpcHostControl
from expertmesh.transport.loop import LoopThread
from expertmesh.transport.network import NetworkTransport

HOT = 0
PATIENCE_S = 60.0


@dataclass
class Mesh:
    """A controller with its hosts, and a router's exchange that follows its placements and is always busy."""

    cluster: ProcessCluster
    controller: Controller
    control: LoopThread
    exchange: Exchange
    expected: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    calling: threading.Lock = field(default_factory=threading.Lock)
    """Held during each call: who holds it has the load pause."""
    calls: int = 0
    hot: int | None = HOT
    tokens: int = 32

    def ask(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.control.run(coroutine)

    def report(self, what: str) -> Any:
        return self.ask(self.controller.report(what))

    def hosts(self) -> dict[str, str]:
        return {host["id"]: host["state"] for host in self.report("hosts")}

    def replicas(self, expert: int, layer: int = 0) -> list[str]:
        return [host["id"] for host in self.report("placement")["hosts"] if [layer, expert] in host["experts"]]

    def imbalance(self) -> float:
        """The slowest host's time over the ideal, in the layer that is used."""
        ratio = self.report("load")["imbalance_of_layers"][0]
        return float("inf") if ratio is None else float(ratio)

    def wait(self, until: Callable[[], bool], what: str) -> float:
        """Seconds until something holds."""
        pause, began = threading.Event(), time.monotonic()
        while not until():
            assert time.monotonic() - began < PATIENCE_S, f"{what} never came: {self.report('decisions')[-12:]}"
            pause.wait(0.1)
        return time.monotonic() - began

    def wait_decision(self, what: str, about: str = "") -> dict[str, Any]:
        """The first entry of the decision log of a kind that mentions something."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = [e for e in self.report("decisions") if e["what"] == what and about in e["why"]]
            return bool(found)

        self.wait(is_there, f"{what} of {about}")
        return found[0]

    def call(self, hot: int | None) -> None:
        """One layer's worth of tokens that nearly all want the hot expert, or all in turn; the rows must be those of
        the first time."""
        x = torch.randn(self.tokens, self.hidden, generator=torch.Generator().manual_seed(7))
        index = (torch.arange(self.tokens) % 16).unsqueeze(1)
        if hot is not None:
            index[torch.arange(self.tokens) % 8 > 0] = hot
        rows = self.exchange.run(0, x, index)
        self.calls += 1
        if not torch.equal(rows, self.expected.setdefault((hot, self.tokens), rows)):
            self.failures.append(f"call {self.calls}: other rows")

    hidden: int = 0


@contextmanager
def running(index: CheckpointIndex, **config: Any) -> Iterator[Mesh]:
    """A mesh under steady load. Every answer is checked."""
    stop = threading.Event()
    options = {name: config.pop(name) for name in ("row_us", "faults", "folders") if name in config}
    with ProcessCluster(**options) as cluster:
        control = LoopThread("controller")
        controller = make_controller(index, cluster, **config)
        control.run(controller.start())
        assert controller.start_up.error is None, controller.start_up.error
        placement = control.run(controller.wait_placement("router", 0, 10))
        mesh = Mesh(cluster, controller, control, Exchange(NetworkTransport(cluster.token), placement))
        mesh.hidden = index.specs[0].hidden

        def follow() -> None:
            while not stop.is_set():
                newer = control.run(mesh.controller.wait_placement("router", mesh.exchange.placement.epoch, 0.5))
                if newer is not None:
                    mesh.exchange.update(newer)

        def load() -> None:
            while not stop.wait(0.002):
                try:
                    with mesh.calling:
                        mesh.call(mesh.hot)
                except ExpertMeshError as error:
                    mesh.failures.append(repr(error))

        threads = [threading.Thread(target=follow), threading.Thread(target=load)]
        for thread in threads:
            thread.start()
        try:
            yield mesh
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            mesh.exchange.close()
            control.run(mesh.controller.stop())
            control.close()
        assert mesh.failures == []
        assert mesh.calls > 0


def make_controller(index: CheckpointIndex, cluster: ProcessCluster, **config: Any) -> Controller:
    pools = config.pop("pools", None) or ({"hosts": 2} | config.pop("pool", {}),)
    experts = {"half_life_s": 1.0, "replan_s": 0.5} | config.pop("experts", {})
    model = config.pop("model", "tiny")
    mesh = MeshConfig(model=model, pools=tuple(PoolSection(**pool) for pool in pools), experts=experts, faults=True)
    return Controller(mesh, cluster, lambda host: GrpcHostControl(host, cluster.token), lambda: index, SYSTEM_CLOCK)
