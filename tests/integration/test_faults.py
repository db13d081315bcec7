"""Every fault that a host can be given, as those who ask it see it: over gRPC and over the local socket."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from expertmesh.chaos.footprint import is_running, is_stopped
from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.source import resolve
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.errors import CheckpointError, ConfigError, ProtocolError, ReplicaUnavailableError
from expertmesh.fault import Fault, FaultKind
from expertmesh.hosts.configuration import configuration_for
from expertmesh.hosts.faults import Faults
from expertmesh.hosts.host import Host
from expertmesh.hosts.process import HostProcess, HostServer
from expertmesh.ids import ExpertId, HostId
from expertmesh.kernels import make_kernel
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.placement import HostInfo
from expertmesh.testing.experts import SILU, Mixture
from expertmesh.transport import Answer, LayerReply, LayerRequest
from expertmesh.transport.grpc_control import GrpcHostControl
from expertmesh.transport.loop import LoopThread
from expertmesh.transport.network import NetworkTransport

MIXTURE = Mixture(ExpertSpec(hidden=16, intermediate=24, activation=SILU), 1, 2)
HELD = [ExpertId(0, 0), ExpertId(0, 1)]
ROWS = np.random.default_rng(7).standard_normal((3, 16)).astype(np.float32)
REQUEST = LayerRequest(0, "float32", ROWS.view(np.uint8), np.array([0, 1, 2, 0], np.int32), [0, 1], [3, 1])


@dataclass
class Asked:
    """A host, asked for rows as a router would, and given orders as the controller would."""

    info: HostInfo
    transport: NetworkTransport
    control: GrpcHostControl
    loop: LoopThread

    def inject(self, *faults: Fault, seed: int = 1) -> Mapping[str, int]:
        return self.loop.run(self.control.inject(faults, seed))

    def ask(self, times: int = 1, timeout_s: float = 20.0) -> list[Answer]:
        """All answers to so many requests: as many, or those of the time."""
        for _ in range(times):
            self.transport.send(self.info, REQUEST)
        answers: list[Answer] = []
        until = time.monotonic() + timeout_s
        while len(answers) < times and (left := until - time.monotonic()) > 0:
            answers += self.transport.receive(left)
        return answers

    def rows(self) -> np.ndarray[Any, Any]:
        (answer,) = self.ask()
        assert isinstance(answer.outcome, LayerReply), answer
        return answer.outcome.rows.view(np.float32).copy()  # they are lent until the next answer is received


@contextlib.contextmanager
def asking(address: str, socket: str, token: str) -> Iterator[Asked]:
    info = HostInfo(id=HostId("cpu-0"), address=address, socket=socket)
    loop = LoopThread("control")

    async def connect() -> GrpcHostControl:
        return GrpcHostControl(info, token)

    asked = Asked(info, NetworkTransport(token), loop.run(connect()), loop)
    try:
        yield asked
    finally:
        asked.transport.close()
        loop.run(asked.control.close())
        loop.close()


@pytest.fixture(params=["gRPC", "local socket"])
def asked(request: pytest.FixtureRequest) -> Iterator[Asked]:
    faults = Faults(SYSTEM_CLOCK)
    host = Host(2**40, "cpu", faults.kernels(make_kernel))
    host.configure(MIXTURE.configuration)
    for expert in HELD:
        host.write(expert, MIXTURE.weights(expert))
    server = HostServer(host, "token", faults=faults)
    with asking(server.address, server.socket if request.param == "local socket" else "", "token") as asked:
        yield asked
    server.close()


def test_without_faults_a_host_that_may_be_broken_answers_as_any_other(asked: Asked) -> None:
    plain = MIXTURE.host(HELD)
    (expected,) = plain.compute([plain.prepare(REQUEST)])
    assert asked.rows().tobytes() == expected.rows.tobytes()
    assert asked.inject() == {}


@pytest.mark.parametrize("kind", [FaultKind.DROP_REQUEST, FaultKind.DROP_REPLY])
def test_what_is_lost_is_lost_and_the_rest_is_answered(asked: Asked, kind: FaultKind) -> None:
    asked.inject(Fault(kind=kind, share=0.5), seed=3)
    answers = asked.ask(40, timeout_s=3.0)
    lost = asked.inject()[kind]
    assert len(answers) == 40 - lost
    assert 8 <= lost <= 32
    assert len(asked.ask(5)) == 5, "it is over when it is replaced"
    done = asked.loop.run(asked.control.statistics()).done.launches
    assert done >= 5


def test_a_request_that_vanishes_is_not_computed_and_one_whose_reply_does_is(asked: Asked) -> None:
    for kind, launches in ((FaultKind.DROP_REQUEST, 0), (FaultKind.DROP_REPLY, 1)):
        before = asked.loop.run(asked.control.statistics()).done.launches
        asked.inject(Fault(kind=kind))
        assert asked.ask(timeout_s=0.3) == []
        asked.inject()
        assert asked.loop.run(asked.control.statistics()).done.launches - before == launches


def test_duplicates_come_twice_and_each_request_still_gets_one_answer(asked: Asked) -> None:
    expected = asked.rows()
    asked.inject(Fault(kind=FaultKind.DUPLICATE_REPLY))
    for _ in range(5):
        assert np.array_equal(asked.rows(), expected)
    assert asked.inject() == {"duplicate_reply": 5}


def test_a_wrong_number_is_wrong_in_one_place_and_finite(asked: Asked) -> None:
    expected = asked.rows()
    asked.inject(Fault(kind=FaultKind.CORRUPT))
    got = asked.rows()
    assert np.isfinite(got).all()
    assert (got != expected).sum() == 1
    asked.inject(Fault(kind=FaultKind.NOT_FINITE))
    assert np.isnan(asked.rows()).sum() == 1
    assert asked.inject() == {"corrupt": 1, "not_finite": 1}
    assert np.array_equal(asked.rows(), expected)


def test_a_slow_launch_takes_its_time_and_says_so(asked: Asked) -> None:
    def compute_s() -> float:
        answers = asked.ask(9)
        return sorted(of.outcome.compute_s for of in answers if isinstance(of.outcome, LayerReply))[4]

    asked.ask(20)
    usual_s = compute_s()
    asked.inject(Fault(kind=FaultKind.SLOW, factor=200))
    assert compute_s() > 20 * usual_s
    assert asked.inject()["slow"] > 0


def test_a_silent_host_answers_nobody_until_it_is_over(asked: Asked) -> None:
    asked.ask()
    asked.inject(Fault(kind=FaultKind.SILENCE, seconds=1.5))
    began_s = time.monotonic()
    assert asked.ask(timeout_s=0.3) == []
    statistics = asked.loop.run(asked.control.statistics())
    assert time.monotonic() - began_s > 1.0, "orders have to wait, too"
    assert len(statistics.replicas) == 2
    assert len(asked.ask()) == 1
    assert asked.inject()["silence"] >= 2
    asked.inject(Fault(kind=FaultKind.SILENCE))
    assert asked.ask(timeout_s=0.3) == []
    asked.inject()
    assert len(asked.ask()) == 1


def test_equal_seeds_hit_equal_messages(asked: Asked) -> None:
    def lost(seed: int) -> list[int]:
        asked.inject(Fault(kind=FaultKind.DROP_REQUEST, share=0.5), seed=seed)
        pattern = [len(asked.ask(timeout_s=0.1)) for _ in range(12)]
        asked.inject()
        return pattern

    assert lost(5) == lost(5) != lost(6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 0.0}, "share: 0.0 is not above 0"),
        ({"share": 1.5}, "share: 1.5 is not above 0"),
        ({"factor": 0.5}, "factor: 0.5 makes nothing slow"),
        ({"seconds": -1.0}, "seconds: -1.0 is below 0"),
    ],
)
def test_a_fault_that_cannot_be_is_refused_by_the_host_too(
    asked: Asked, fields: dict[str, float], message: str
) -> None:
    fault = Fault(kind=FaultKind.SLOW, factor=2.0)
    for name, value in fields.items():
        object.__setattr__(fault, name, value)
    with pytest.raises(ProtocolError, match=f"faults: {message}"):
        asked.inject(fault)


def test_a_host_that_was_not_started_to_be_broken_refuses() -> None:
    server = HostServer(MIXTURE.host(HELD), "token")
    with asking(server.address, server.socket, "token") as asked:
        with pytest.raises(ConfigError, match="not started to be broken: say `faults: true` in the config"):
            asked.inject(Fault(kind=FaultKind.KILL))
        assert len(asked.ask()) == 1
    server.close()


# --- what takes a process ---------------------------------------------------------------------------------------------


def wait_for(condition: Any, what: str, limit_s: float = 10.0) -> None:
    pause, until = threading.Event(), time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, f"{what} never came"
        pause.wait(0.01)


@pytest.fixture(scope="module")
def process() -> Iterator[HostProcess]:
    with HostProcess("token", memory="64MiB", faults=True) as running:
        yield running


def test_a_load_that_is_made_to_fail_fails_and_the_next_does_not(process: HostProcess) -> None:
    index = index_checkpoint(resolve("tiny"), "float32")
    expert = ExpertId(0, 3)
    with asking(process.address, process.socket, "token") as asked:
        asked.loop.run(asked.control.configure(configuration_for(index, "tiny")))
        asked.inject(Fault(kind=FaultKind.FAIL_LOAD))
        with pytest.raises(CheckpointError, match="expert 0:3: this load was made to fail"):
            asked.loop.run(asked.control.load(expert, index.recipes[expert]))
        assert asked.inject() == {"fail_load": 1}
        asked.loop.run(asked.control.load(expert, index.recipes[expert]))
        assert [held for held, _ in asked.loop.run(asked.control.statistics()).replicas] == [expert]


def test_a_paused_process_stops_and_goes_on(process: HostProcess) -> None:
    with asking(process.address, process.socket, "token") as asked:
        assert asked.inject(Fault(kind=FaultKind.PAUSE, seconds=0.5))["pause"] == 1
        wait_for(lambda: is_stopped(process.pid), "the stop")
        wait_for(lambda: not is_stopped(process.pid), "the end of it")
        assert asked.loop.run(asked.control.statistics()).at_s > 0


def test_a_killed_process_says_so_and_is_gone() -> None:
    with HostProcess("token", memory="64MiB", faults=True) as running:
        with asking(running.address, running.socket, "token") as asked:
            assert asked.inject(Fault(kind=FaultKind.KILL)) == {"kill": 1}
            wait_for(lambda: not is_running(running.pid), "its end")
            with pytest.raises(ReplicaUnavailableError):
                asked.inject()
        assert running._process.wait() == -signal.SIGKILL


def test_the_parent_can_be_killed_as_a_node_would_be() -> None:
    child = "from expertmesh import signals; signals.kill_parent_soon(); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    running = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, env=dict(os.environ))
    assert running.wait(timeout=30) == -signal.SIGKILL
    assert running.stdin is not None
    running.stdin.close()
