"""The exchange and hosts that are ill but not dead: hung, slow, wrong. The answer is the same, and it comes in time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from expertmesh.doubt import Doubt
from expertmesh.hosts.host import Host
from expertmesh.hosts.process import HostServer
from expertmesh.ids import ExpertId, HostId
from expertmesh.kernels import make_kernel
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.moe.exchange import Exchange, ExchangeLimits
from expertmesh.moe.health import HealthOptions
from expertmesh.placement import HostInfo, Placement
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.transport.local import LocalTransport
from expertmesh.transport.network import NetworkTransport

MIXTURE = Mixture(ExpertSpec(hidden=24, intermediate=16, activation=SILU), 1, 4)
ALL = [ExpertId(0, e) for e in range(4)]
X = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
INDEX = torch.tensor([[t % 4, (t + 1 + t // 4) % 4] for t in range(9)])
HEALTH = HealthOptions(late_unknown_s=0.1, late_least_s=0.05, shun_first_s=0.05, probe_every_s=0.01)


@dataclass
class Ill:
    """A kernel that does as told by `does`, until it is told to be well again."""

    kernel: object
    does: Callable[[torch.Tensor], torch.Tensor] | None = None
    spec: object = field(init=False)

    def __post_init__(self) -> None:
        self.spec = self.kernel.spec
        self.num_slots = self.kernel.num_slots
        self.write = self.kernel.write
        self.clear = self.kernel.clear
        self.launches = 0

    def run(self, x_TH: torch.Tensor, row_P: torch.Tensor, slot_P: torch.Tensor) -> torch.Tensor:
        self.launches += 1
        y_PH = self.kernel.run(x_TH, row_P, slot_P)
        return self.does(y_PH) if self.does else y_PH


class Mesh:
    """Hosts behind real gRPC that each hold every expert, and an exchange."""

    def __init__(self, names: str, limits: ExchangeLimits, health: HealthOptions = HEALTH) -> None:
        self.kernels: dict[str, Ill] = {}
        self.doubts: list[Doubt] = []
        infos, self._servers = [], []
        for name in names:
            host = Host(2**40, make=lambda *arguments, name=name: self._kernel(name, *arguments))
            host.configure(MIXTURE.configuration)
            for expert in ALL:
                host.write(expert, MIXTURE.weights(expert))
            server = HostServer(host, "token")
            self._servers.append(server)
            infos.append(HostInfo(id=HostId(name), address=server.address, socket=server.socket))
        replicas = dict.fromkeys(ALL, tuple(info.id for info in infos))
        self.placement = Placement(epoch=1, hosts=tuple(infos), num_experts=(4,), replicas=replicas)
        self.exchange = Exchange(NetworkTransport("token"), self.placement, limits, health=health, rng=random.Random(0))
        self.exchange.on_doubt(self.doubts.append)

    def _kernel(self, name: str, *arguments: object) -> Ill:
        self.kernels[name] = Ill(make_kernel(*arguments))
        return self.kernels[name]

    def run(self) -> torch.Tensor:
        return self.exchange.run(0, X, INDEX)

    def close(self) -> None:
        self.exchange.close()
        for server in self._servers:
            server.close()


@contextmanager
def mesh_of(names: str, health: HealthOptions = HEALTH, **limits: float) -> Iterator[Mesh]:
    mesh = Mesh(names, ExchangeLimits(**{"timeout_s": 20, "retry_s": 0.02, "hedge_share": 1.0} | limits), health)
    try:
        yield mesh
    finally:
        for kernel in mesh.kernels.values():
            kernel.does = None
        mesh.close()


def hang(go_on: threading.Event, timeout_s: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Answer only then."""

    def wait(y_PH: torch.Tensor) -> torch.Tensor:
        go_on.wait(timeout_s)
        return y_PH

    return wait


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    placement = MIXTURE.placement({"only": ALL})
    exchange = Exchange(LocalTransport(MIXTURE.hosts(placement)), placement)
    yield exchange.run(0, X, INDEX)
    exchange.close()


def test_a_hung_host_holds_nothing_up_is_shunned_and_comes_back(expected: torch.Tensor) -> None:
    with mesh_of("ab") as mesh:
        for _ in range(50):
            mesh.run()
        go_on = threading.Event()
        mesh.kernels["a"].does = hang(go_on, 20)
        started = time.perf_counter()
        for _ in range(10):
            assert torch.equal(mesh.run(), expected)
        assert time.perf_counter() - started < 5.0, "an attempt would have taken 20 s"
        assert mesh.exchange.avoided == {"a"}
        assert 1 <= mesh.exchange.counts.overtaken <= 4
        go_on.set()
        while mesh.exchange.avoided:
            assert torch.equal(mesh.run(), expected)
            assert time.perf_counter() - started < 15.0
        launches = mesh.kernels["a"].launches
        mesh.run()
        assert mesh.kernels["a"].launches > launches
        assert not mesh.doubts


def test_without_budget_nothing_is_asked_for_twice(expected: torch.Tensor) -> None:
    with mesh_of("ab", hedge_share=0.0, hedges_saved=0.0) as mesh:
        mesh.run()
        mesh.kernels["a"].does = hang(threading.Event(), 0.3)
        assert torch.equal(mesh.run(), expected)
        assert mesh.exchange.counts.hedges == 0


def test_the_only_host_is_asked_even_when_it_is_not_trusted(expected: torch.Tensor) -> None:
    with mesh_of("a", attempt_timeout_s=0.1) as mesh:
        mesh.run()
        mesh.kernels["a"].does = hang(threading.Event(), 0.3)
        for _ in range(3):
            assert torch.equal(mesh.run(), expected)
        assert mesh.exchange.avoided == {"a"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_computed_elsewhere_and_reported(expected: torch.Tensor, value: float) -> None:
    def spoil(y_PH: torch.Tensor) -> torch.Tensor:
        y_PH[-1, 3] = value
        return y_PH

    with mesh_of("ab") as mesh:
        mesh.kernels["b"].does = spoil
        mesh.kernels["a"].does = spoil if mesh.kernels["b"].launches else None
        for _ in range(5):
            assert torch.equal(mesh.run(), expected)
        assert {doubt.host for doubt in mesh.doubts} == {"b"}
        assert all("not finite" in doubt.cause for doubt in mesh.doubts)


def test_what_two_hosts_call_not_finite_is_the_models_own() -> None:
    def spoil(y_PH: torch.Tensor) -> torch.Tensor:
        y_PH[:, 0] = float("nan")
        return y_PH

    with mesh_of("ab") as mesh:
        for kernel in mesh.kernels.values():
            kernel.does = spoil
        rows = mesh.run()
        assert rows[..., 0].isnan().all()
        assert rows[..., 1:].isfinite().all()


def test_an_only_replica_that_stays_at_it_is_believed_in_the_end() -> None:
    def spoil(y_PH: torch.Tensor) -> torch.Tensor:
        y_PH[0, 0] = float("nan")
        return y_PH

    with mesh_of("a", doubt_s=0.2) as mesh:
        mesh.kernels["a"].does = spoil
        assert mesh.run().isnan().sum() == 1
        assert {doubt.host for doubt in mesh.doubts} == {"a"}


def test_rows_that_went_in_not_finite_are_nobodys_fault() -> None:
    with mesh_of("ab") as mesh:
        x = X.clone()
        x[4, 7] = float("nan")
        rows = mesh.exchange.run(0, x, INDEX)
        assert rows[4].isnan().all()
        assert rows[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
        assert not mesh.doubts


def test_a_host_that_computes_wrongly_is_found_by_the_majority(expected: torch.Tensor) -> None:
    with mesh_of("abc", double_check_share=1.0) as mesh:
        mesh.kernels["c"].does = lambda y_PH: y_PH + 1e-3
        for _ in range(20):
            mesh.run()
        assert mesh.doubts
        assert {doubt.host for doubt in mesh.doubts} == {"c"}
        assert {doubt.expert for doubt in mesh.doubts} <= set(ALL)


def test_of_two_hosts_that_differ_both_are_doubted(expected: torch.Tensor) -> None:
    with mesh_of("ab", double_check_share=1.0) as mesh:
        mesh.kernels["a"].does = lambda y_PH: y_PH * 1.001
        for _ in range(20):
            mesh.run()
        assert {doubt.host for doubt in mesh.doubts} == {"a", "b"}


def test_hosts_that_agree_are_never_doubted(expected: torch.Tensor) -> None:
    with mesh_of("abc", double_check_share=1.0) as mesh:
        for _ in range(20):
            assert torch.equal(mesh.run(), expected)
        assert mesh.exchange.counts.double_checked > 10
        assert not mesh.doubts


def test_a_launch_that_fails_is_asked_of_another_host(expected: torch.Tensor) -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    with mesh_of("ab") as mesh:
        mesh.kernels["a"].does = fail
        for _ in range(3):
            assert torch.equal(mesh.run(), expected)
