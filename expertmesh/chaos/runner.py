"""Runs a script against a live mesh under load, from the undisturbed answers to the last one.

What is due is the schedule's business, to do it the striker's, what must hold the oracles'. Its invariant: the load
runs from before the first fault until the mesh is whole again.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from expertmesh.bench.crowd import Crowd, undisturbed
from expertmesh.chaos.history import History
from expertmesh.chaos.mesh import started
from expertmesh.chaos.schedule import Schedule
from expertmesh.chaos.striker import PROOF_S, RETRY_S, Striker
from expertmesh.chaos.watch import Watch
from expertmesh.errors import ConfigError
from expertmesh.models import DOMAINS, heldout
from expertmesh.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from expertmesh.chaos.mesh import Mesh
    from expertmesh.chaos.script import Script

TICK_S = 0.05
PROMPT_CHARACTERS = 100


def run(script: Script, *, port: int, report: Callable[[Progress], None], seed: int | None = None) -> History:
    """The whole script: what happened. Raises ConfigError when it cannot even begin."""
    with started(script, port, report) as mesh:
        return Run(script, script.seed if seed is None else seed, mesh, report).history()


class Run:
    """One run."""

    def __init__(self, script: Script, seed: int, mesh: Mesh, report: Callable[[Progress], None]) -> None:
        self._script = script
        self._seed = seed
        self._mesh = mesh
        self._report = report
        self._watch = Watch(mesh.url, mesh.wanted, mesh.ready_routers)
        self._striker = Striker(script, mesh.url, self._watch)
        self._pause = threading.Event()

    def history(self) -> History:
        """Run it."""
        script, load = self._script, self._script.load
        prompts = _prompts(load.prompts)
        self._report(Progress(phase="asking each prompt once, undisturbed"))
        right = undisturbed(self._mesh.url, prompts, load.tokens, model=self._mesh.model)
        with self._watch as watch:
            self._report(Progress(phase="waiting until the mesh is whole"))
            if not watch.wait(lambda look: look.is_whole, script.patience):
                raise ConfigError(f"mesh: it is not whole after {script.patience:g} s: {self._wrong()}")
            crowd = Crowd(self._mesh.url, prompts, clients=load.clients, tokens=load.tokens, model=self._mesh.model)
            with crowd:
                self._pause.wait(min(3.0, load.steady / 2))  # the first answers are slower
                steady_from_s = time.perf_counter()
                self._report(Progress(phase=f"{load.clients} clients, undisturbed for {load.steady:g} s"))
                self._pause.wait(load.steady)
                faults_from_s = time.perf_counter()
                stuck = self._break(faults_from_s)
                self._end_faults()
                settled_s, unsettled = self._settle()
                ended_s = time.perf_counter()
                self._report(Progress(phase="waiting for the last answers"))
        return History(
            script=script,
            seed=self._seed,
            answers=crowd.answers,
            right=right,
            strikes=self._striker.strikes,
            steady_from_s=steady_from_s,
            faults_from_s=faults_from_s,
            ended_s=ended_s,
            looks=watch.looks,
            settled_s=settled_s,
            unsettled=unsettled,
            footprints=watch.footprints,
            starts_s=list(watch.starts_s.values()),
            stuck=stuck,
        )

    def _break(self, from_s: float) -> str:
        """Do all that the script says. What could not be done."""
        schedule, striker = Schedule(self._script, self._seed), self._striker
        duration_s = self._script.duration
        while True:
            now_s = time.perf_counter() - from_s
            if now_s >= duration_s if duration_s is not None else schedule.is_done:
                return schedule.missed() or ""
            if stuck := schedule.stuck(now_s):
                return stuck
            look = self._watch.latest
            if look.began_s >= striker.look_from_s:
                for shot in schedule.due(now_s, look):
                    striker.strike(shot, look)
            striker.prove()
            phase = f"{self._script.name}: faults that are proven, of those that were done"
            self._report(Progress(phase=phase, done=striker.num_proven, total=len(striker.strikes)))
            self._pause.wait(TICK_S)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end_faults(self) -> None:
        """End what lasts, and wait for the last proofs."""
        self._report(Progress(phase="ending the faults"))
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < PROOF_S + RETRY_S:
            self._striker.prove(at_end=True)
            if all(strike.proof or strike.problem for strike in self._striker.strikes):
                return
            self._pause.wait(TICK_S)

    def _settle(self) -> tuple[float | None, str]:
        """How long it takes until the mesh is whole and nothing is left over; or what is wrong with it."""
        self._report(Progress(phase="waiting until the mesh is whole again"))
        last_s = max((strike.at_s for strike in self._striker.strikes), default=time.perf_counter())
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < self._script.must.settle:
            look = self._watch.latest
            if look.began_s > self._striker.look_from_s and not self._wrong():
                return max(0.0, look.began_s - last_s), ""
            self._pause.wait(TICK_S)
        return None, self._wrong()

    def _wrong(self) -> str:
        """Why the mesh is not whole; nothing if it is."""
        look, processes = self._watch.latest, self._watch.processes
        if look.error:
            return look.error
        if not look.is_covered:
            lacking = sum(len(hosts) < look.wanted.replicas for hosts in look.holders.values())
            return f"{lacking} of {len(look.holders)} experts have fewer than {look.wanted.replicas} replicas"
        if not look.is_whole:
            states = ", ".join(f"{host['id']} {host['state']}" for host in look.hosts)
            return f"hosts: {states}; routers: {look.routers} of {look.wanted.routers}"
        members = {host["pid"] for host in look.hosts}
        spare = [process.pid for process in processes if process.role == "hosts" and process.pid not in members]
        if self._mesh.standby is not None and len(spare) > self._mesh.standby:
            return f"processes {spare} are hosts of nobody; {self._mesh.standby} stand by"
        controllers = [process.pid for process in processes if process.role == "controller"]
        if len(controllers) > 1:
            return f"there are {len(controllers)} controllers"
        return ""


def _prompts(count: int) -> list[str]:
    """Openings from all domains in turn."""
    texts = [heldout(domain) for domain in DOMAINS]
    starts = [977 * (number // len(texts)) for number in range(count)]
    return [texts[number % len(texts)][start : start + PROMPT_CHARACTERS] for number, start in enumerate(starts)]
