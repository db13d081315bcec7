"""Does what is due to a live mesh, and makes sure that it was done: no fault is taken at its word.

A process that was to end is gone; one that was to stop was seen stopped; of what lasts, the host says how often it has
hit. Its invariant: every strike ends up proven, or with the reason why not.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from expertmesh.chaos.footprint import is_running, is_stopped
from expertmesh.chaos.history import DEAD_S, Strike
from expertmesh.client import fetch, order
from expertmesh.errors import ConfigError
from expertmesh.fault import AT_ONCE, FaultKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expertmesh.chaos.look import Look
    from expertmesh.chaos.schedule import Shot
    from expertmesh.chaos.script import Script
    from expertmesh.chaos.watch import Watch

PROOF_S = 15.0
"""How long after a death its signs may take to show."""
NONSENSE = frozenset({FaultKind.CORRUPT, FaultKind.NOT_FINITE})
"""What makes the mesh itself get rid of a host."""
RETRY_S = 20.0
"""How long an order is repeated that nobody takes, for the controller may just be away."""


class Striker:
    """Of one run."""

    def __init__(self, script: Script, url: str, watch: Watch) -> None:
        self.strikes: list[Strike] = []
        self.look_from_s = 0.0
        """Looks that were begun before this are too old to act on."""
        self._script = script
        self._url = url
        self._watch = watch
        self._pause = threading.Event()

    # --- striking ----------------------------------------------------------------------------------------------------

    def strike(self, shot: Shot, look: Look) -> None:
        """Do what is due. `look` is what it was aimed by."""
        step = self._script.steps[shot.step]
        if step.scale is not None:
            strike = self._note(shot, "mesh", ("scale",), ())
            if self._order(strike, "scale", pool=step.scale.pool, hosts=step.scale.hosts) is not None:
                strike.proof = f"pool {step.scale.pool} was ordered to have {step.scale.hosts} hosts"
            return
        faults = [fault.value for fault in step.faults]
        kinds = tuple(fault.kind.value for fault in faults)
        # To kill a node, one of its hosts is enough: the others go with it.
        groups = [shot.targets] if FaultKind.KILL_NODE in kinds else [(target,) for target in shot.targets]
        for number, hosts in enumerate(groups):
            is_host = step.target not in ("router", "controller")
            strike = self._note(shot, hosts[0], kinds, hosts if is_host else ())
            strike.victim = _describe(look, hosts) if is_host else f"the {hosts[0]}"
            strike.pids = tuple(self._watch.pids[host] for host in hosts if is_host and host in self._watch.pids)
            strike.lasts = not AT_ONCE & set(kinds)
            answer = self._order(
                strike,
                "fault",
                target=hosts[0],
                faults=[fault.to_json() for fault in faults],
                seed=(shot.seed + number) % 2**32,
            )
            if answer is None:
                continue
            if "process_id" in answer:
                strike.pids = (answer["process_id"],)
            if strike.lasts and all(fault.seconds for fault in faults):
                strike.until_s = strike.at_s + max(fault.seconds for fault in faults)
            strike.counts = answer.get("fired", {})
            self._count(hosts[0], strike.counts, but=strike)
            if strike.deadly:
                self._watch.bury(strike.hosts)
                self.look_from_s = time.perf_counter() + DEAD_S

    def _note(self, shot: Shot, target: str, kinds: tuple[str, ...], hosts: tuple[str, ...]) -> Strike:
        deadly = self._script.steps[shot.step].is_deadly
        strike = Strike(
            step=shot.step,
            turn=shot.turn,
            kinds=kinds,
            target=target,
            hosts=hosts,
            at_s=time.perf_counter(),
            deadly=deadly,
        )
        self.strikes.append(strike)
        return strike

    def _order(self, strike: Strike, what: str, **values: Any) -> dict[str, Any] | None:
        """The answer to an order, which is repeated for a while; when it comes, is when it struck. None: none came."""
        began_s = time.perf_counter()
        while True:
            try:
                answer: dict[str, Any] = order(self._url, what, **values)
            except ConfigError as error:
                if time.perf_counter() - began_s > RETRY_S or self._has_gone(strike):
                    strike.problem = f"nobody took the order: {error}"
                    return None
                self._pause.wait(0.2)
            else:
                strike.at_s = time.perf_counter()
                return answer

    # --- proving -----------------------------------------------------------------------------------------------------

    @property
    def num_proven(self) -> int:
        """Strikes that are known to have happened."""
        return sum(bool(strike.proof) for strike in self.strikes)

    def prove(self, *, at_end: bool = False) -> None:
        """Look for signs of what is not proven yet."""
        now_s = time.perf_counter()
        for strike in self.strikes:
            if strike.proof or strike.problem:
                continue
            if strike.deadly:
                if strike.pids and not any(map(is_running, strike.pids)):
                    strike.proof = f"process {', '.join(map(str, strike.pids))} has ended"
                elif not strike.pids and set(strike.hosts) <= self._hosts_of("host ended"):
                    strike.proof = "the decision log says that it ended"
                elif now_s - strike.at_s > PROOF_S:
                    strike.problem = "it has not ended"
            elif not strike.lasts:
                if any(map(is_stopped, strike.pids)):
                    strike.proof = f"process {strike.pids[0]} was seen stopped"
                elif not strike.pids:
                    strike.proof = "the host said that it would be stopped"
                elif now_s - strike.at_s > PROOF_S:
                    strike.problem = "it was never seen stopped"
            elif now_s > strike.until_s or at_end:
                self._ask_counts(strike)

    def _has_gone(self, strike: Strike) -> bool:
        """Whether the host that a strike was for is no more."""
        look = self._watch.latest
        return bool(strike.hosts) and not look.error and look.began_s > strike.at_s and strike.target not in look.names

    def _hosts_of(self, what: str) -> set[str]:
        """The hosts that the decision log says this of."""
        try:
            return {entry["host"] for entry in fetch(self._url, "/mesh/decisions") if entry["what"] == what}
        except ConfigError:
            return set()

    def _ask_counts(self, strike: Strike) -> None:
        """End the faults of a strike, if they last, and hear how often they have hit."""
        try:
            answer = order(self._url, "fault", target=strike.target, faults=[], seed=0)
        except ConfigError as error:
            if self._has_gone(strike):
                if NONSENSE.issuperset(strike.kinds) and strike.target in self._hosts_of("distrust"):
                    strike.proof = "the decision log says that it was doubted, and replaced"
                else:
                    strike.problem = f"it could not be asked: {error}"
            return  # it is asked again
        self._count(strike.target, answer["fired"])

    def _count(self, target: str, counts: Mapping[str, int], *, but: Strike | None = None) -> None:
        """A host says how often each kind has hit so far: the proof of what it had before."""
        for strike in self.strikes:
            is_open = not strike.proof and not strike.problem
            if strike is but or strike.target != target or not is_open or not strike.lasts:
                continue
            times = {kind: counts.get(kind, 0) - strike.counts.get(kind, 0) for kind in strike.kinds}
            if all(times.values()):
                strike.proof = ", ".join(f"{kind} {number} times" for kind, number in times.items())
            else:
                strike.problem = f"it never hit: {', '.join(kind for kind, number in times.items() if not number)}"


def _describe(look: Look, hosts: Sequence[str]) -> str:
    """What hosts were just before they were hit."""
    texts = []
    for name in hosts:
        held = [of for of in look.holders.values() if name in of]
        alone = sum(len(of) == 1 for of in held)
        texts.append(f"{name}, with {len(held)} replicas, {alone} of them the only one")
    return "; ".join(texts)
