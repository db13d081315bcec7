"""The control plane over real host processes: hosts come, go and die, and no answer changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.recipe import CheckpointIndex
from expertmesh.checkpoint.source import resolve
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.config import MeshConfig, PoolSection
from expertmesh.control.controller import Controller
from expertmesh.errors import ExpertMeshError
from expertmesh.moe.exchange import Exchange
from expertmesh.testing.processes import ProcessCluster
from expertmesh.transport.grpc_control import GrpcHostControl
from expertmesh.transport.loop import LoopThread
from expertmesh.transport.network import NetworkTransport

HOT, COLD = 0, 15
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def index() -> CheckpointIndex:
    return index_checkpoint(resolve("tiny"), "float32")


@dataclass
class Mesh:
    """A controller with its hosts, and a router's exchange that follows its placements and is always busy."""

    cluster: ProcessCluster
    controller: Controller
    control: LoopThread
    exchange: Exchange
    expected: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
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
    with ProcessCluster(row_us=config.pop("row_us", None)) as cluster:
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
    mesh = MeshConfig(model="tiny", pools=tuple(PoolSection(**pool) for pool in pools), experts=experts)
    return Controller(mesh, cluster, lambda host: GrpcHostControl(host, cluster.token), lambda: index, SYSTEM_CLOCK)


def test_a_hot_expert_gains_a_replica_and_loses_it_when_it_has_gone_cold(index: CheckpointIndex) -> None:
    with running(index) as mesh:
        took_s = mesh.wait(lambda: len(mesh.replicas(HOT)) == 2, "a second replica of the hot expert")
        assert took_s < 10
        mesh.hot = COLD
        mesh.wait(lambda: len(mesh.replicas(COLD)) == 2, "a second replica of the newly hot expert")
        mesh.wait(lambda: len(mesh.replicas(HOT)) == 1, "the old one's retirement")


def test_the_death_of_a_host_loses_nothing_and_it_is_replaced(index: CheckpointIndex) -> None:
    with running(index, experts={"min_replicas": 2}) as mesh:
        mesh.wait(lambda: mesh.calls > 50, "load")
        victim, survivor = sorted(mesh.hosts())
        mesh.cluster.kill(victim)
        mesh.wait(lambda: victim not in mesh.hosts() and len(mesh.hosts()) == 2, "a new host")
        mesh.wait(lambda: all(len(mesh.replicas(e)) == 2 for e in range(16)), "two replicas of each expert again")
        assert survivor in mesh.hosts()


def test_the_death_of_the_only_copies_is_waited_out(index: CheckpointIndex) -> None:
    with running(index, pool={"hosts": 1}) as mesh:
        mesh.wait(lambda: mesh.calls > 50, "load")
        (victim,) = mesh.hosts()
        mesh.cluster.kill(victim)
        before = mesh.calls
        mesh.wait(lambda: mesh.calls > before + 50, "answers from a new host")


def test_hosts_are_added_and_drained_as_asked(index: CheckpointIndex) -> None:
    with running(index, pool={"hosts": 2, "min": 2, "max": 4}) as mesh:
        mesh.ask(mesh.controller.order("scale", {"pool": "cpu", "hosts": 3}))
        mesh.wait(lambda: list(mesh.hosts().values()) == ["ready"] * 3, "a third host")
        mesh.wait(lambda: all(host["replicas"] for host in mesh.report("hosts")), "work for it")
        mesh.ask(mesh.controller.order("scale", {"pool": "cpu", "hosts": 2}))
        mesh.wait(lambda: len(mesh.hosts()) == 2, "its end")
        assert "ended" not in [entry["what"] for entry in mesh.report("decisions")]


def test_a_host_that_stands_by_takes_part_in_a_moment(index: CheckpointIndex) -> None:
    with running(index, pool={"hosts": 1, "max": 2, "standby": 1}) as mesh:
        mesh.wait(lambda: mesh.cluster.num_hosts == 2, "a host that stands by")
        assert list(mesh.hosts()) == ["cpu-0"]
        mesh.wait(lambda: not mesh.controller._keeper._members.standby._coming["cpu"], "its preparation")
        mesh.ask(mesh.controller.order("scale", {"pool": "cpu", "hosts": 2}))
        took_s = mesh.wait(
            lambda: all(host["rows"] for host in mesh.report("hosts")) and len(mesh.hosts()) == 2, "rows"
        )
        assert took_s < 4
        mesh.wait(lambda: mesh.cluster.num_hosts == 3, "another to stand by")


def test_a_new_controller_goes_on_where_the_last_one_stopped(index: CheckpointIndex) -> None:
    with running(index) as mesh:
        mesh.wait(lambda: mesh.calls > 50, "load")
        hosts, epoch = mesh.hosts(), mesh.exchange.placement.epoch
        mesh.control.run(mesh.controller.leave())
        mesh.controller = make_controller(index, mesh.cluster)
        mesh.control.run(mesh.controller.start())
        assert mesh.hosts().keys() == hosts.keys()
        assert mesh.report("placement")["epoch"] == epoch
        before = mesh.calls
        mesh.wait(lambda: mesh.calls > before + 50, "answers all the while")


def test_unlike_hosts_get_rows_by_their_measured_rates(index: CheckpointIndex) -> None:
    """One host is three times slower. The rows of each follow its rate, and the layer's time is near the ideal."""
    pools = ({"name": "fast", "hosts": 1}, {"name": "slow", "hosts": 1})
    with running(index, pools=pools, row_us={"fast": 40, "slow": 120}) as mesh:
        mesh.tokens, mesh.hot = 512, None
        mesh.wait(lambda: mesh.calls > 100, "load")
        mesh.wait(lambda: mesh.imbalance() < 1.05, "a placement that suits the rates")
        before = {host["id"]: host for host in mesh.report("hosts")}
        begun = mesh.calls
        mesh.wait(lambda: mesh.calls > begun + 200, "a measurement")
        hosts = mesh.report("hosts")
        rows = {host["id"]: host["rows"] - before[host["id"]]["rows"] for host in hosts}
        rates = {host["id"]: (host["rate"] + before[host["id"]]["rate"]) / 2 for host in hosts}
        for host, of in rows.items():
            share = of / sum(rows.values())
            assert share == pytest.approx(rates[host] / sum(rates.values()), rel=0.1), (rows, rates)
        assert rates["fast-0"] / rates["slow-0"] == pytest.approx(3, rel=0.1)
        slowest_s = max(of / rates[host] for host, of in rows.items())
        assert slowest_s <= 1.1 * sum(rows.values()) / sum(rates.values())
