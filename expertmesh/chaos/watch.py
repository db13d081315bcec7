"""Looks at a mesh again and again while something else happens to it, over HTTP and in /proc.

Owns a thread. Its invariant: `latest` is never older than one round of questions; what could not be asked says so.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from expertmesh.chaos.footprint import is_running, parent, processes, totals
from expertmesh.chaos.look import Look, Wanted
from expertmesh.client import fetch
from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from expertmesh.chaos.footprint import Process

PAUSE_S = 0.1
FOOTPRINT_EVERY_S = 1.0


class Watch:
    """Runs while it is entered. Times are of `time.perf_counter`."""

    def __init__(self, url: str, wanted: Wanted, ready_routers: Callable[[], int] | None = None) -> None:
        """`ready_routers` says how many take requests; None: it cannot be told."""
        self.looks: list[tuple[float, bool, bool]] = []
        """Of each: when it was begun, and whether the mesh was covered, and whole."""
        self.footprints: list[tuple[float, Mapping[str, Mapping[str, float]]]] = []
        self.processes: Sequence[Process] = ()
        """Those of the mesh on this machine, at the last look."""
        self.pids: dict[str, int] = {}
        """Of every host of this machine that was ever seen."""
        self.starts_s: dict[str, float] = {}
        """Of each host that came: from when it was known to come until a placement named it."""
        self._known_at: dict[str, float] = {}
        self._url = url
        self._wanted = wanted
        self._ready_routers = ready_routers
        self._dead: set[str] = set()
        self._managers: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-watch", daemon=True)
        self.latest = Look(began_s=time.perf_counter(), wanted=wanted, error="nothing was seen yet")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def bury(self, hosts: Sequence[str]) -> None:
        """These have been killed, whatever a view says."""
        self._dead |= set(hosts)

    def wait(self, until: Callable[[Look], bool], limit_s: float) -> bool:
        """Whether something came to be seen in time."""
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < limit_s:
            if self.latest.began_s >= began_s and not self.latest.error and until(self.latest):
                return True
            self._stop.wait(PAUSE_S)
        return False

    def _run(self) -> None:
        while not self._stop.is_set():
            self.latest = look = self._look()
            self.looks.append((look.began_s, look.holds("covered"), look.holds("whole")))
            if not self.footprints or look.began_s - self.footprints[-1][0] >= FOOTPRINT_EVERY_S:
                self.footprints.append((look.began_s, totals(self.processes)))
            self._stop.wait(PAUSE_S)

    def _look(self) -> Look:
        began_s = time.perf_counter()
        try:
            hosts = fetch(self._url, "/mesh/hosts")
            placement = fetch(self._url, "/mesh/placement")
            moves = fetch(self._url, "/mesh/moves")["moves"]
        except ConfigError as error:
            return Look(began_s=began_s, wanted=self._wanted, error=str(error))
        here = self._learn(hosts)
        self._time_starts(began_s, hosts, placement)
        self.processes = processes(self._managers)
        return Look(
            began_s=began_s,
            hosts=hosts,
            placement=placement,
            num_moves=len(moves),
            routers=self._count_routers(),
            dead=frozenset(self._dead | {host for host, pid in self.pids.items() if not is_running(pid)}),
            here=frozenset(here),
            wanted=self._wanted,
        )

    def _learn(self, hosts: Sequence[Mapping[str, Any]]) -> set[str]:
        """Note the processes of hosts that run on this machine: its nodes."""
        here = set()
        for host in hosts:
            if _is_here(host["address"]):
                here.add(host["node"])
                if host["id"] not in self.pids and is_running(host["pid"]):
                    self.pids[host["id"]] = host["pid"]
                    self._managers |= {of for of in [parent(host["pid"])] if of is not None}
        return here

    def _time_starts(self, now_s: float, hosts: Sequence[Mapping[str, Any]], placement: Mapping[str, Any]) -> None:
        """Note how long hosts take to come. Those that are there at the first look came before it."""
        known_at = now_s if self._known_at else -math.inf
        for host in hosts:
            self._known_at.setdefault(host["id"], known_at)
        for host in placement["hosts"]:
            took_s = now_s - self._known_at.get(host["id"], -math.inf)
            if host["experts"] and took_s < math.inf:
                self.starts_s.setdefault(host["id"], took_s)

    def _count_routers(self) -> int | None:
        """Routers that are ready and have not just been killed, which their keeper sees later."""
        if self._ready_routers is None:
            return None
        alive = sum(process.role == "routers" for process in self.processes)
        return min(self._ready_routers(), alive) if alive else self._ready_routers()


def _is_here(address: str) -> bool:
    """Whether a host's address is one of this machine: only such can be bound."""
    name = address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in name else socket.AF_INET) as probe:
        probe.bind((name, 0))
        return True
    return False
