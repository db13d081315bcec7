"""A controller that dies in the middle of anything: the next one gets there, and nothing is left over.

A crash is an event loop that stops between two steps: no handler runs, and no order is taken back.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, ClassVar

import pytest
import torch

from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.recipe import CheckpointIndex
from expertmesh.checkpoint.source import resolve
from expertmesh.control.controller import Controller
from expertmesh.errors import ExpertMeshError
from expertmesh.ids import HostId
from expertmesh.moe.exchange import Exchange
from expertmesh.placement import Placement
from expertmesh.testing.processes import ProcessCluster
from expertmesh.transport.network import NetworkTransport
from tests.integration.kept import PATIENCE_S, make_controller

CRASHES = int(os.environ.get("EXPERTMESH_TEST_CRASHES", "3"))
HOSTS, MOST_HOSTS = 2, 3
POOL = {"hosts": HOSTS, "min": HOSTS, "max": MOST_HOSTS, "standby": 1}


@pytest.fixture(scope="module")
def index() -> CheckpointIndex:
    return index_checkpoint(resolve("tiny"), "float32")


class Doomed:
    """A controller on a loop of its own, which can stop at any moment."""

    graves: ClassVar[list[asyncio.AbstractEventLoop]] = []
    """Stopped loops: what was under way on them must never go on, not even to be cleaned up."""

    def __init__(self, index: CheckpointIndex, cluster: ProcessCluster) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        experts = {"min_replicas": 2}
        self.controller: Controller = make_controller(index, cluster, pool=dict(POOL), experts=experts)
        self.started = asyncio.run_coroutine_threadsafe(self.controller.start(), self._loop)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    def crash(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self.graves.append(self._loop)

    def stop(self) -> None:
        self.run(self.controller.stop())
        self.crash()


@pytest.fixture
def cluster() -> Iterator[ProcessCluster]:
    with ProcessCluster() as cluster:
        yield cluster


def wait(until: Callable[[], bool], what: str) -> None:
    pause, began = threading.Event(), time.monotonic()
    while not until():
        assert time.monotonic() - began < PATIENCE_S, f"{what} never came"
        pause.wait(0.1)


def test_whatever_a_controller_was_at_when_it_died_the_next_one_gets_there(
    index: CheckpointIndex, cluster: ProcessCluster
) -> None:
    rng, pause = random.Random(11), threading.Event()
    doomed = Doomed(index, cluster)
    doomed.started.result(PATIENCE_S)
    first: Placement = doomed.run(doomed.controller.wait_placement("router", 0, 10))
    exchange = Exchange(NetworkTransport(cluster.token), first)
    x = torch.randn(32, index.specs[0].hidden, generator=torch.Generator().manual_seed(7))
    chosen = (torch.arange(32) % 16).unsqueeze(1)
    rows = exchange.run(0, x, chosen)
    try:
        for _ in range(CRASHES):
            disturb(rng, doomed, cluster)
            pause.wait(rng.uniform(0, 2))
            doomed.crash()
            doomed = Doomed(index, cluster)
            while rng.random() < 0.3:
                pause.wait(rng.uniform(0, 0.2))
                doomed.crash()
                doomed = Doomed(index, cluster)
            doomed.started.result(PATIENCE_S)
            assert doomed.controller.start_up.error is None
            assert torch.equal(exchange.run(0, x, chosen), rows)
            newer = doomed.run(doomed.controller.wait_placement("router", exchange.placement.epoch, 0.5))
            if newer is not None:
                exchange.update(newer)

        wait(lambda: is_scaled(doomed), "a time to scale")
        wait(lambda: is_converged(doomed, cluster, index), "convergence")
        newer = doomed.run(doomed.controller.wait_placement("router", 0, 1))
        exchange.update(newer)
        assert torch.equal(exchange.run(0, x, chosen), rows)
    finally:
        exchange.close()
        doomed.stop()


def disturb(rng: random.Random, doomed: Doomed, cluster: ProcessCluster) -> None:
    """Give it something to do."""
    deed = rng.choice(["more hosts", "fewer hosts", "rebalance", "a host dies", "nothing"])
    try:
        if deed == "more hosts":
            doomed.run(doomed.controller.order("scale", {"pool": "cpu", "hosts": MOST_HOSTS}))
        elif deed == "fewer hosts":
            doomed.run(doomed.controller.order("scale", {"pool": "cpu", "hosts": HOSTS}))
        elif deed == "rebalance":
            doomed.run(doomed.controller.order("rebalance", {}))
        elif deed == "a host dies":
            hosts = doomed.run(doomed.controller.report("hosts"))
            placed = doomed.run(doomed.controller.report("placement"))["hosts"]
            holders = [host["id"] for host in placed if host["experts"]]
            if len(holders) > 2 and len(hosts) > 2:
                cluster.kill(HostId(rng.choice(holders)))
    except ExpertMeshError:
        return  # it is busy with the last order


def is_scaled(doomed: Doomed) -> bool:
    try:
        doomed.run(doomed.controller.order("scale", {"pool": "cpu", "hosts": HOSTS}))
    except ExpertMeshError:
        return False
    return True


def is_converged(doomed: Doomed, cluster: ProcessCluster, index: CheckpointIndex) -> bool:
    """Every process that runs for the mesh is a host or stands by, and every expert has its copies."""
    hosts = doomed.run(doomed.controller.report("hosts"))
    placed = doomed.run(doomed.controller.report("placement"))["hosts"]
    copies = [tuple(expert) for host in placed for expert in host["experts"]]
    members = {host["id"] for host in hosts}
    return (
        [host["state"] for host in hosts] == ["ready"] * HOSTS
        and len(cluster.lent) == HOSTS + 1
        and members < cluster.lent
        and all(copies.count(tuple(expert)) >= 2 for expert in index.recipes)
    )
