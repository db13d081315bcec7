"""What is wanted set against what is there, indexed for the reconciler's questions. Decides nothing.

Everything in it is in a fixed order, so that equal pictures lead to equal steps.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from expertmesh.control.state import HostStatus, ReplicaStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from expertmesh.control.actions import Limits
    from expertmesh.control.state import HostState, Observed
    from expertmesh.ids import ExpertId, HostId


class View:
    """One look at the whole picture."""

    def __init__(
        self, desired: Mapping[ExpertId, Sequence[HostId]], observed: Observed, limits: Limits, now: float
    ) -> None:
        self.observed = observed
        self.limits = limits
        self.now = now
        self.hosts = [observed.hosts[host] for host in sorted(observed.hosts)]
        self.desired = {expert: tuple(dict.fromkeys(desired[expert])) for expert in sorted(desired)}
        self._takers = {host.id for host in self.hosts if host.status is HostStatus.READY}
        self.goal: dict[HostId, set[ExpertId]] = {host.id: set() for host in self.hosts}
        """By host, what it is to hold: nothing, unless it is ready."""
        for expert, hosts in self.desired.items():
            for host_id in hosts:
                if host_id in self._takers:
                    self.goal[host_id].add(expert)
        ready: dict[ExpertId, list[HostId]] = {}
        for host in self.hosts:
            if host.is_serving:
                for expert, replica in host.replicas.items():
                    if replica.status is ReplicaStatus.READY:
                        ready.setdefault(expert, []).append(host.id)
        self.ready = dict(sorted(ready.items()))
        """By expert that has any, the hosts whose replica of it answers."""

    def takes(self, host: HostId) -> bool:
        """Whether a host may be given replicas."""
        return host in self._takers

    def unwanted(self, expert: ExpertId) -> list[HostId]:
        """The hosts that have a ready replica of an expert and are not to hold it."""
        return [host for host in self.ready.get(expert, ()) if expert not in self.goal[host]]

    def is_named(self, expert: ExpertId, host: HostId) -> bool:
        """Whether the current placement names a replica."""
        return host in self.observed.current.get(expert, ())

    def room(self, host: HostState, replicas: Iterable[ExpertId]) -> Counter[int]:
        """Per shape, the slots that a host would have left with these replicas; less than 0 if they do not fit."""
        room = Counter(dict(enumerate(host.slots)))
        room.subtract(self.observed.shape(expert) for expert in replicas)
        return room


def held(host: HostState) -> set[ExpertId]:
    """The experts that take a slot of a host, or may."""
    return {expert for expert, replica in host.replicas.items() if replica.status is not ReplicaStatus.FAILED}
