"""What the control plane is busy with, for people to see, and whether it is stuck, for an alarm. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmesh.control.state import HostStatus, ReplicaStatus

if TYPE_CHECKING:
    from expertmesh.control.reconciler import Steps
    from expertmesh.control.state import Observed


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One thing that is under way."""

    what: str
    """Such as "loading 0:3 on a"."""
    since: float
    until: float
    """When it is given up, or tried again; inf: it has no deadline."""
    note: str = ""


def moves(observed: Observed) -> tuple[Move, ...]:
    """All that is under way, the oldest first."""
    found = [
        Move(what=f"{host.status} {host.id}", since=host.since, until=float("inf"))
        for host in observed.hosts.values()
        if host.status is not HostStatus.READY
    ]
    for host in observed.hosts.values():
        for expert, replica in host.replicas.items():
            if replica.status is not ReplicaStatus.READY:
                what = f"{replica.status} {expert} on {host.id}"
                note = f"failed {replica.failures} times: {replica.cause}" if replica.failures else ""
                found.append(Move(what=what, since=replica.since, until=replica.until, note=note))
    if observed.published and observed.published[0] is not observed.published[-1]:
        current = observed.published[-1]
        what = f"waiting for routers at epoch {observed.oldest_epoch} to take {current.epoch}"
        found.append(Move(what=what, since=current.at, until=float("inf")))
    return tuple(sorted(found, key=lambda move: (move.since, move.what)))


class Watchdog:
    """Says when the control loop has stopped turning, or turns and gets nowhere.

    Not only a loop that died: one whose every load fails would look busy for ever.
    """

    def __init__(self, now: float, *, loop_s: float = 30.0, progress_s: float = 300.0) -> None:
        """Alarms after `loop_s` without a turn, or `progress_s` of turns that bring what is wanted no nearer."""
        self._loop_s = loop_s
        self._progress_s = progress_s
        self._turned_at = now
        self._progressed_at = now
        self._remaining = 0

    def turned(self, steps: Steps, now: float) -> None:
        """The control loop has made a turn."""
        # More to do than before is progress too: something else is wanted now, or the world has changed.
        if steps.remaining != self._remaining or steps.is_converged:
            self._progressed_at = now
        self._turned_at, self._remaining = now, steps.remaining

    def alarm(self, now: float) -> str:
        """What is wrong, in a sentence; "" while all is well. May be asked from outside the loop."""
        if now - self._turned_at >= self._loop_s:
            return f"the control loop has not turned for {now - self._turned_at:.0f} s"
        if self._remaining and now - self._progressed_at >= self._progress_s:
            return f"no progress for {now - self._progressed_at:.0f} s, with {self._remaining} replicas to go"
        return ""
