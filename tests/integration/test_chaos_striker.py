"""What is done to a mesh is proven, or the run knows that it is not: against a made-up mesh of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from expertmesh.chaos import striker as striking
from expertmesh.chaos.history import Strike
from expertmesh.chaos.look import Wanted
from expertmesh.chaos.schedule import Shot
from expertmesh.chaos.script import parse_script
from expertmesh.chaos.striker import Striker
from expertmesh.chaos.watch import Watch
from expertmesh.testing.http_server import listening


class MadeUpMesh:
    """Two hosts that do nothing but live; each expert is on both. Orders are noted, and obeyed if `obeys`."""

    def __init__(self) -> None:
        self.hosts = {name: subprocess.Popen(["sleep", "60"]) for name in ("cpu-0", "cpu-1")}
        self.orders: list[dict[str, Any]] = []
        self.fired: dict[str, int] = {}
        self.obeys = True
        self.distrusts = False
        """Whether a host that computes nonsense is replaced before it can be asked how often it did."""
        self.app = Starlette(
            routes=[
                Route("/mesh/hosts", self._hosts),
                Route("/mesh/placement", self._placement),
                Route("/mesh/moves", lambda _: JSONResponse({"moves": []})),
                Route("/mesh/decisions", self._decisions),
                Route("/mesh/fault", self._fault, methods=["POST"]),
            ]
        )

    def _hosts(self, _: Request) -> JSONResponse:
        values = {"state": "ready", "node": "here", "address": "127.0.0.1:1"}
        there = {name: host for name, host in self.hosts.items() if host.poll() is None}
        return JSONResponse([{"id": name, "pid": host.pid, **values} for name, host in there.items()])

    def _placement(self, _: Request) -> JSONResponse:
        hosts = [{"id": name, "experts": [[0, 0], [0, 1]]} for name in self.hosts]
        return JSONResponse({"num_experts": [2], "hosts": hosts})

    def _decisions(self, _: Request) -> JSONResponse:
        ended = [name for name, host in self.hosts.items() if host.poll() is not None]
        log = [{"what": "host ended", "host": name} for name in ended]
        return JSONResponse(log + [{"what": "distrust", "host": name} for name in ended if self.distrusts])

    async def _fault(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.orders.append(body)
        if (host := self.hosts[body["target"]]).poll() is not None:
            return JSONResponse({"error": {"message": f"{body['target']} is no host"}}, status_code=400)
        answer = JSONResponse({"accepted": True, "fired": dict(self.fired)})
        for fault in body["faults"] if self.obeys else ():
            if fault["kind"] in ("kill", "pause"):
                what = signal.SIGKILL if fault["kind"] == "kill" else signal.SIGSTOP
                os.kill(self.hosts[body["target"]].pid, what)
            else:
                self.fired[fault["kind"]] = self.fired.get(fault["kind"], 0) + 3
                if self.distrusts:
                    host.kill()
        return answer

    def close(self) -> None:
        for host in self.hosts.values():
            host.kill()
            host.wait()


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeUpMesh]:
    monkeypatch.setenv("EXPERTMESH_TOKEN", "token")
    monkeypatch.setattr(striking, "PROOF_S", 0.5)
    made_up = MadeUpMesh()
    yield made_up
    made_up.close()


def struck(mesh: MadeUpMesh, fault: dict[str, Any], *, in_s: float = 2.0) -> Strike:
    """What became of one fault, on one host."""
    script = parse_script({"name": "test", "mesh": {}, "steps": [{"faults": [fault], "target": "host cpu-1"}]}, "test")
    with listening(mesh.app) as url, Watch(url, Wanted(replicas=2)) as watch:
        assert watch.wait(lambda look: look.is_whole, 10.0)
        striker = Striker(script, url, watch)
        striker.strike(Shot(step=0, turn=0, targets=("cpu-1",), seed=7), watch.latest)
        (strike,) = striker.strikes

        def is_settled(_: object) -> bool:
            striker.prove(at_end=True)
            return bool(strike.proof or strike.problem)

        assert watch.wait(is_settled, in_s)
        return strike


def test_a_host_that_was_killed_is_gone(mesh: MadeUpMesh) -> None:
    strike = struck(mesh, {"kind": "kill"})
    assert strike.proof == f"process {mesh.hosts['cpu-1'].pid} has ended"
    assert strike.victim == "cpu-1, with 2 replicas, 0 of them the only one"
    assert (mesh.orders[0]["target"], mesh.orders[0]["seed"]) == ("cpu-1", 7)


def test_a_host_that_was_stopped_is_seen_so(mesh: MadeUpMesh) -> None:
    strike = struck(mesh, {"kind": "pause", "seconds": 1})
    assert strike.proof == f"process {mesh.hosts['cpu-1'].pid} was seen stopped"


def test_what_lasts_is_proven_by_what_it_has_hit_since(mesh: MadeUpMesh) -> None:
    mesh.fired = {"corrupt": 4}
    strike = struck(mesh, {"kind": "corrupt"})
    assert strike.proof == "corrupt 3 times"
    assert mesh.orders[-1]["faults"] == [], "it is ended to be counted"


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"kind": "kill"}, "it has not ended"),
        ({"kind": "pause", "seconds": 1}, "it was never seen stopped"),
        ({"kind": "corrupt"}, "it never hit: corrupt"),
    ],
)
def test_a_fault_that_was_accepted_and_did_not_happen_is_found_out(
    mesh: MadeUpMesh, fault: dict[str, Any], problem: str
) -> None:
    mesh.obeys = False
    strike = struck(mesh, fault)
    assert (strike.proof, strike.problem) == ("", problem)


@pytest.mark.parametrize(
    ("kind", "proof", "problem"),
    [
        ("not_finite", "the decision log says that it was doubted, and replaced", ""),
        ("slow", "", "it could not be asked: "),
    ],
)
def test_a_host_that_is_replaced_for_its_nonsense_has_been_hit(
    mesh: MadeUpMesh, kind: str, proof: str, problem: str
) -> None:
    mesh.distrusts = True
    strike = struck(mesh, {"kind": kind, **({"factor": 2} if kind == "slow" else {})}, in_s=10)
    assert strike.proof == proof
    assert strike.problem.startswith(problem)
    assert bool(strike.problem) == bool(problem)
