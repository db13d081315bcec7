"""Which wanted replicas to load now, and why the others cannot be. Pure.

Its invariant: no host is given more than it has slots for, counting what is loading or may not be dropped yet.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from expertmesh.control.actions import Load
from expertmesh.control.state import ReplicaStatus
from expertmesh.control.view import View, held

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from expertmesh.ids import ExpertId, HostId


class Loading:
    """From one look at the picture: the loads to begin, the most urgent first, as far as slots and limits go.

    Why one free slot on each host is enough (the planner leaves it empty): suppose that no load is possible for want
    of slots, and all that may be dropped is gone. Each host that misses a wanted replica is full, so it holds more
    unwanted replicas than it misses wanted ones: it would have a slot to spare with all it wants. An unwanted replica
    is there because its expert must keep it until one is ready elsewhere, and no expert keeps more of those than it
    misses wanted ones. So over all such hosts there are no more unwanted replicas than missing ones: a contradiction.
    By the same count a single free slot on any one of them is enough, whatever the order of loads; with none, what is
    left is a ring of replicas waiting for one another's slots, and `blocked` says so.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self.loads: list[Load] = []
        self.starved: dict[HostId, list[ExpertId]] = defaultdict(list)
        """By host, what could be loaded but for a slot."""
        self._choose()

    def _choose(self) -> None:
        view, limits = self._view, self._view.limits
        room = {host.id: view.room(host, held(host)) for host in view.hosts}
        loading = {
            host.id: sum(replica.status is ReplicaStatus.LOADING for replica in host.replicas.values())
            for host in view.hosts
        }
        missing = list(self._missing())
        full = {host for expert, host in missing if room[host][view.observed.shape(expert)] <= 0}
        left = limits.loads_at_once - sum(loading.values())
        for _, expert, host in sorted((self._urgency(expert, host, full), expert, host) for expert, host in missing):
            shape = view.observed.shape(expert)
            if room[host][shape] <= 0:
                self.starved[host].append(expert)
            elif left > 0 and loading[host] < limits.loads_per_host:
                room[host][shape] -= 1
                loading[host] += 1
                left -= 1
                deadline = view.now + limits.load_timeout_s
                self.loads.append(Load(host=host, expert=expert, deadline=deadline, why=self._why(expert)))

    def _missing(self) -> Iterator[tuple[ExpertId, HostId]]:
        """What is wanted where it is not, unless its last load failed a moment ago."""
        for expert, hosts in self._view.desired.items():
            for host in filter(self._view.takes, hosts):
                replica = self._view.observed.hosts[host].replicas.get(expert)
                if replica is None or (replica.status is ReplicaStatus.FAILED and replica.until <= self._view.now):
                    yield expert, host

    def _urgency(self, expert: ExpertId, host: HostId, full: set[HostId]) -> int:
        """Less is more urgent: experts that nobody can compute, then those short of copies, then those in the way."""
        view = self._view
        before = view.desired[expert][: view.desired[expert].index(host)]
        coming = (other for other in view.desired[expert] if self._is_loading(expert, other))
        copies = len({*view.ready.get(expert, ()), *coming, *filter(view.takes, before)})
        unwanted = view.unwanted(expert)
        if copies == 0:
            return 0
        if copies < view.limits.min_replicas:
            return 1
        if not full.isdisjoint(unwanted):
            return 2
        return 3 if unwanted else 4

    def _is_loading(self, expert: ExpertId, host: HostId) -> bool:
        known = self._view.observed.hosts.get(host)
        replica = known.replicas.get(expert) if known else None
        return replica is not None and replica.status is ReplicaStatus.LOADING

    def _why(self, expert: ExpertId) -> str:
        if unwanted := self._view.unwanted(expert):
            return f"to replace the one on {unwanted[0]}"
        ready = len(self._view.ready.get(expert, ()))
        return f"{ready} ready of {len(self._view.desired[expert])} wanted"

    def blocked(self) -> Iterator[str]:
        """What stands in the way of what is wanted, in sentences."""
        view = self._view
        for host in view.hosts:
            for shape, room in sorted(view.room(host, view.goal[host.id]).items()):
                if room < 0:
                    slots = host.slots[shape]
                    yield f"host {host.id} is to hold {slots - room} experts and has {slots} slots"
        for host_id, experts in sorted(self.starved.items()):
            kept = len(held(view.observed.hosts[host_id]) - view.goal[host_id])
            yield f"host {host_id} has no free slot for {_list(experts)}: {kept} others there have nowhere to go"
        for host_id in sorted({host for hosts in view.desired.values() for host in hosts if not view.takes(host)}):
            known = view.observed.hosts.get(host_id)
            experts = [expert for expert, hosts in view.desired.items() if host_id in hosts]
            yield f"host {host_id} is to hold {_list(experts)} and is {known.status if known else 'gone'}"
        if unplaced := [expert for expert in view.ready if not view.desired.get(expert)]:
            yield f"no host is to hold {_list(unplaced)}, so that the last copies stay"


def _list(experts: Sequence[ExpertId], most: int = 3) -> str:
    """A few experts by name."""
    names = ", ".join(map(str, experts[:most]))
    return names + (f" and {len(experts) - most} more" if len(experts) > most else "")
