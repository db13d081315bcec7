"""The exchange under failure: every row comes back once, the same as ever, or a typed error in time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from expertmesh.errors import DeadlineExceededError, ReplicaFailedError
from expertmesh.hosts.host import Host
from expertmesh.hosts.process import HostServer
from expertmesh.ids import ExpertId, HostId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.moe.exchange import Exchange, ExchangeLimits
from expertmesh.placement import HostInfo, Placement
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.transport import LayerRequest
from expertmesh.transport.local import LocalTransport
from expertmesh.transport.network import NetworkTransport

MIXTURE = Mixture(ExpertSpec(hidden=24, intermediate=16, activation=SILU), 1, 4)
ALL = [ExpertId(0, e) for e in range(4)]
X = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
INDEX = torch.tensor([[t % 4, (t + 1 + t // 4) % 4] for t in range(9)])
QUICK = ExchangeLimits(timeout_s=20, attempt_timeout_s=0.3, retry_s=0.02)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    placement = MIXTURE.placement({"only": ALL})
    exchange = Exchange(LocalTransport(MIXTURE.hosts(placement)), placement)
    yield exchange.run(0, X, INDEX)
    exchange.close()


@pytest.fixture
def servers() -> Iterator[dict[str, HostServer]]:
    """Three gRPC hosts; every expert is on two of them."""
    held = {"a": ALL[:3], "b": ALL[1:], "c": [ALL[0], ALL[3]]}
    running = {name: HostServer(MIXTURE.host(experts), "token") for name, experts in held.items()}
    yield running
    for server in running.values():
        server.close()


def placement_of(servers: dict[str, HostServer]) -> Placement:
    hosts = tuple(
        HostInfo(id=HostId(name), address=server.address, socket=server.socket) for name, server in servers.items()
    )
    a, b, c = (host.id for host in hosts)
    return Placement(
        epoch=1,
        hosts=hosts,
        num_experts=(4,),
        replicas={ALL[0]: (a, c), ALL[1]: (a, b), ALL[2]: (a, b), ALL[3]: (b, c)},
    )


@pytest.mark.parametrize("victim", ["a", "b", "c"])
def test_a_dead_hosts_rows_are_answered_by_other_replicas(servers, expected, victim: str) -> None:
    exchange = Exchange(NetworkTransport("token"), placement_of(servers), QUICK)
    assert torch.equal(exchange.run(0, X, INDEX), expected)
    servers[victim].close()
    for _ in range(3):
        assert torch.equal(exchange.run(0, X, INDEX), expected)
    exchange.close()


def test_rows_wait_for_a_host_that_comes_back(expected) -> None:
    """The only copy goes, and is there again at the same address a little later: nothing is lost."""
    host = MIXTURE.host(ALL)
    server = HostServer(host, "token")
    info = HostInfo(id=HostId("h"), address=server.address, socket=server.socket)
    placement = Placement(epoch=1, hosts=(info,), num_experts=(4,), replicas=dict.fromkeys(ALL, (info.id,)))
    exchange = Exchange(NetworkTransport("token"), placement, QUICK)
    exchange.run(0, X, INDEX)
    server.close()
    answers: list[torch.Tensor] = []
    waiting = threading.Thread(target=lambda: answers.append(exchange.run(0, X, INDEX)))
    waiting.start()
    server = HostServer(host, "token", port=int(info.address.rpartition(":")[2]))
    waiting.join(timeout=15)
    assert len(answers) == 1
    assert torch.equal(answers[0], expected)
    exchange.close()
    server.close()


def test_rows_wait_for_a_placement_that_names_a_replica(expected) -> None:
    whole = MIXTURE.placement({"h": ALL}, epoch=2)
    partial = MIXTURE.placement({"h": ALL[:2]}, epoch=1)
    exchange = Exchange(LocalTransport(MIXTURE.hosts(whole)), partial, QUICK)
    answers: list[torch.Tensor] = []
    waiting = threading.Thread(target=lambda: answers.append(exchange.run(0, X, INDEX)))
    waiting.start()
    exchange.update(whole)
    waiting.join(timeout=15)
    assert torch.equal(answers[0], expected)
    exchange.close()


def test_an_older_placement_changes_nothing() -> None:
    placement = MIXTURE.placement({"h": ALL}, epoch=5)
    exchange = Exchange(LocalTransport(MIXTURE.hosts(placement)), placement, QUICK)
    exchange.update(MIXTURE.placement({}, epoch=4))
    exchange.run(0, X[:1], INDEX[:1])
    assert exchange.placement.epoch == 5
    exchange.close()


def test_without_a_replica_the_deadline_ends_it() -> None:
    exchange = Exchange(LocalTransport({}), MIXTURE.placement({}), ExchangeLimits(timeout_s=0.2, retry_s=0.02))
    with pytest.raises(DeadlineExceededError, match=r"layer 0 did not answer within 0\.2 s") as caught:
        exchange.run(0, X, INDEX)
    assert caught.value.deadline_s == 0.2
    exchange.close()


class Silent(LocalTransport):
    """A transport to hosts of which one never answers."""

    def __init__(self, hosts: dict[HostId, Host], silent: str) -> None:
        super().__init__(hosts)
        self._silent = silent

    def send(self, host: HostInfo, request: LayerRequest) -> int:
        return -1 if host.id == self._silent else super().send(host, request)


def test_a_host_that_hangs_is_given_up_on(expected) -> None:
    placement = MIXTURE.placement({"hung": ALL, "well": ALL})
    exchange = Exchange(Silent(MIXTURE.hosts(placement), "hung"), placement, QUICK)
    assert torch.equal(exchange.run(0, X, INDEX), expected)
    exchange.close()


def test_a_launch_that_fails_is_not_sent_elsewhere() -> None:
    host = MIXTURE.host(ALL)
    server = HostServer(host, "token")
    info = HostInfo(id=HostId("h"), address=server.address, socket=server.socket)
    placement = Placement(epoch=1, hosts=(info,), num_experts=(4,), replicas=dict.fromkeys(ALL, (info.id,)))
    exchange = Exchange(NetworkTransport("token"), placement, QUICK)
    host._pools[0].kernel.run = lambda *_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ReplicaFailedError, match="ZeroDivisionError") as caught:
        exchange.run(0, X, INDEX)
    assert caught.value.host == "h"
    exchange.close()
    server.close()


def test_no_tokens_are_no_work() -> None:
    exchange = Exchange(LocalTransport({}), MIXTURE.placement({"h": ALL}), QUICK)
    assert exchange.run(0, X[:0], INDEX[:0]).shape == (0, 2, 24)
    exchange.close()


@pytest.mark.parametrize("local_sockets", [True, False])
def test_an_exchange_goes_on_while_its_caller_does_something_else(servers, expected, local_sockets: bool) -> None:
    """Hosts answer in the meantime, and are not blamed for answers that nobody looked for."""
    exchange = Exchange(NetworkTransport("token", local_sockets=local_sockets), placement_of(servers), QUICK)
    exchange.run(0, X, INDEX)
    for _ in range(3):
        finish = exchange.begin(0, X, INDEX)
        answered = threading.Event()
        threading.Timer(2 * QUICK.attempt_timeout_s, answered.set).start()
        answered.wait()
        assert torch.equal(finish(), expected)
    assert exchange.counts.sent_again == exchange.counts.hedges == 0
    exchange.close()


def test_an_exchange_that_another_overtakes_is_given_up(expected) -> None:
    placement = MIXTURE.placement({"h": ALL})
    exchange = Exchange(LocalTransport(MIXTURE.hosts(placement)), placement, QUICK)
    never = exchange.begin(0, X + 1, INDEX)
    assert torch.equal(exchange.run(0, X, INDEX), expected)
    with pytest.raises(RuntimeError, match="another exchange"):
        never()
    assert torch.equal(exchange.begin(0, X, INDEX)(), expected)
    exchange.close()
