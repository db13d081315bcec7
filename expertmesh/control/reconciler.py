"""The reconciler: from what is wanted and what is there to the next steps. One pure function.

It looks at the whole picture each time and remembers nothing, so that lost, repeated and reordered messages, slow or
failing loads and restarts all converge. There is no move: a replica is copied, a placement that names the copy is
published, the old replica drains until no router can hold a placement that names it, and only then is it dropped.
Its invariant: no step of ours leaves an expert that has a ready replica without one, held or published.

Nor is there a step that cancels a load. It might have been carried out all the same, so that only the load's end, or
its deadline, tells what a host holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmesh.control.loading import Loading
from expertmesh.control.publication import Publication
from expertmesh.control.state import HostStatus, ReplicaStatus
from expertmesh.control.view import View, held

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expertmesh.control.actions import Action, Limits
    from expertmesh.control.state import Observed
    from expertmesh.ids import ExpertId, HostId


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What to do now, and how far there is to go."""

    actions: tuple[Action, ...]
    """They do not depend on one another: in any order, or at once."""
    blocked: tuple[str, ...]
    """Why neither these steps nor time will lead to what is wanted, if so. Want something else, such as what is."""
    remaining: int
    """Replicas that are wanted and not ready, and those that are held and not wanted."""
    is_urgent: bool = False
    """Whether experts are short of the copies that keep them safe."""
    wake_at: float
    """When time alone may allow more; inf: never."""

    @property
    def is_converged(self) -> bool:
        """Whether all is as wanted, and the current placement says so."""
        return not (self.remaining or self.actions or self.blocked)


def reconcile(desired: Mapping[ExpertId, Sequence[HostId]], observed: Observed, limits: Limits, now: float) -> Steps:
    """The next steps towards `desired`, which may be stale, partial or infeasible. Deterministic."""
    view = View(desired, observed, limits, now)
    publication, loading = Publication(view), Loading(view)
    actions: list[Action] = [*publication.publish(), *publication.drops(), *loading.loads, *publication.stops()]
    is_waiting = actions or publication.is_due or publication.awaits_routers or _is_under_way(observed, now)
    return Steps(
        actions=tuple(actions),
        blocked=() if is_waiting else tuple(loading.blocked()),
        remaining=_remaining(view),
        is_urgent=any(
            len(view.ready.get(expert, ())) < min(limits.min_replicas, len(hosts))
            for expert, hosts in view.desired.items()
        ),
        wake_at=_wake_at(view, publication),
    )


def _is_under_way(observed: Observed, now: float) -> bool:
    """Whether an answer, or the end of a pause, is still to come."""
    passing = (HostStatus.STARTING, HostStatus.STOPPING, HostStatus.UNREACHABLE)
    if not observed.is_settled or any(host.status in passing for host in observed.hosts.values()):
        return True
    return any(
        replica.until > now if replica.status is ReplicaStatus.FAILED else replica.status is not ReplicaStatus.READY
        for host in observed.hosts.values()
        for replica in host.replicas.values()
    )


def _remaining(view: View) -> int:
    missing = sum(host not in view.ready.get(expert, ()) for expert, hosts in view.desired.items() for host in hosts)
    return missing + sum(len(held(host) - view.goal[host.id]) for host in view.hosts if host.is_serving)


def _wake_at(view: View, publication: Publication) -> float:
    times = [replica.until for host in view.hosts for replica in host.replicas.values()]
    if publication.is_due:
        times.append(publication.earliest)
    return min((time for time in times if time > view.now), default=float("inf"))
