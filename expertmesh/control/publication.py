"""What routers are told, and which slots are given back after they heard it. Pure.

Its invariant: an expert that has a ready replica is named with one, and a named replica is never dropped.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING

from expertmesh.control.actions import Drop, Publish, StopHost
from expertmesh.control.state import HostStatus, ReplicaStatus
from expertmesh.control.view import View, held

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from expertmesh.ids import ExpertId, HostId


class Publication:
    """From one look at the picture: the placement that should be in force, and what stands between."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._observed = view.observed
        self._silent = {host.id for host in view.hosts if host.status in (HostStatus.STARTING, HostStatus.UNREACHABLE)}
        """The hosts that may hold anything: they do not say."""
        self.replicas = self._replicas()
        """What a placement should name now, in a fixed order."""

    def _replicas(self) -> dict[ExpertId, tuple[HostId, ...]]:
        """Every ready replica that is wanted, and as many others as it takes to keep what an expert has.

        That is at least `min_replicas`, and up to the number wanted, so that a hot expert is not short of replicas
        while its new ones load. What is kept above the minimum gives way where its slot is needed.
        """
        view = self._view
        named: dict[ExpertId, set[HostId]] = {}
        spare: dict[HostId, list[ExpertId]] = defaultdict(list)
        for expert, ready in view.ready.items():
            unwanted = view.unwanted(expert)
            if not unwanted:
                named[expert] = set(ready)
                continue
            # What routers use already goes first: to name another in its place would only cost an epoch.
            unwanted.sort(key=lambda host: (not view.is_named(expert, host), host))
            num_ready = len(ready) - len(unwanted)
            num_wanted = len(view.desired.get(expert, ()))
            least = min(view.limits.min_replicas, num_wanted or view.limits.min_replicas)
            kept = unwanted[: max(0, least - num_ready)]
            named[expert] = {*kept, *(host for host in ready if expert in view.goal[host])}
            for host in unwanted[len(kept) : max(0, num_wanted - num_ready)]:
                spare[host].append(expert)
        for host, experts in self._affordable(named, spare).items():
            for expert in experts:
                named[expert].add(host)
        doubted = self._observed.doubted
        for expert, hosts in self._observed.current.items():
            if expert not in named:  # one that may answer again is better than none
                named[expert] = {host for host in hosts if host in self._silent and (expert, host) not in doubted}
        return {expert: tuple(sorted(named[expert])) for expert in sorted(named) if named[expert]}

    def _affordable(
        self, named: Mapping[ExpertId, set[HostId]], spare: Mapping[HostId, list[ExpertId]]
    ) -> dict[HostId, list[ExpertId]]:
        """Of the replicas that could be spared, by host, those whose slots nothing else needs.

        A host keeps room for all that it is to hold, loaded or not. To go by what is loading at the moment would make
        the answer change from turn to turn.
        """
        view = self._view
        keeps = {host: set(view.goal[host]) for host in spare}
        for expert, hosts in named.items():
            for host in keeps.keys() & hosts:
                keeps[host].add(expert)
        affordable: dict[HostId, list[ExpertId]] = {}
        for host, experts in sorted(spare.items()):
            room = view.room(self._observed.hosts[host], keeps[host])
            affordable[host] = []
            for expert in sorted(experts, key=lambda expert: (not view.is_named(expert, host), expert)):
                room[self._observed.shape(expert)] -= 1
                if room[self._observed.shape(expert)] >= 0:
                    affordable[host].append(expert)
        return affordable

    @cached_property
    def is_due(self) -> bool:
        """Whether routers should be told something else than they were."""
        if not self._observed.is_settled:
            return False
        if self._observed.newest_epoch == 0:  # routers begin to serve with the first: it names every expert
            return bool(self.replicas) and self.replicas.keys() >= self._view.desired.keys()
        if not self._observed.published:  # nobody remembers what routers use: it may be what a silent host holds
            return not self._silent
        current = {expert: tuple(sorted(hosts)) for expert, hosts in self._observed.current.items() if hosts}
        return current != self.replicas

    @cached_property
    def earliest(self) -> float:
        """When it may be told: at once, if a replica is named that is gone, or one that was missing is back."""
        if self._is_urgent or not self._observed.published:
            return self._view.now
        return self._observed.published[-1].at + self._view.limits.publish_every_s

    @property
    def _is_urgent(self) -> bool:
        current, ready = self._observed.current, self._view.ready
        for expert, hosts in current.items():
            if not set(hosts) <= set(ready.get(expert, self.replicas.get(expert, ()))):
                return True
        if any(not current.get(expert) for expert in ready):
            return True
        # The copies that keep every expert safe are told of together, once the last of them is there.
        least = self._view.limits.min_replicas
        return any(len(current[expert]) < least <= len(self.replicas[expert]) for expert in ready) and all(
            len(self.replicas.get(expert, ())) >= min(least, len(self._view.desired[expert]))
            for expert in self._view.desired
        )

    def publish(self) -> Iterator[Publish]:
        """Tell the routers what is due."""
        if self.is_due and self._view.now >= self.earliest:
            yield Publish(epoch=self._observed.newest_epoch + 1, replicas=self.replicas, why=self._changes())

    def _changes(self) -> str:
        before = {(expert, host) for expert, hosts in self._observed.current.items() for host in hosts}
        after = {(expert, host) for expert, hosts in self.replicas.items() for host in hosts}
        missing = len(self._view.desired.keys() - self.replicas.keys())
        changes = f"{len(after - before)} replicas more, {len(before - after)} fewer"
        return changes + (f"; {missing} experts have none" if missing else "")

    def drops(self) -> Iterator[Drop]:
        """Free the slots of replicas that no router can know of, while routers know of another one that answers.

        A condemned one is worth less than none.
        """
        deadline = self._view.now + self._view.limits.drop_timeout_s
        for state in self._view.hosts:
            for expert, replica in state.replicas.items():
                is_due = replica.status is ReplicaStatus.CONDEMNED and state.is_serving
                if is_due and not self._may_be_used(expert, state.id):
                    yield Drop(host=state.id, expert=expert, deadline=deadline, why=replica.cause)
        for expert, host in self.retired():
            others = self.replicas[expert]
            if self._observed.newest_epoch:
                others = tuple(other for other in others if self._view.is_named(expert, other))
            if others and not self._may_be_used(expert, host):
                why = f"not wanted here, and ready on {', '.join(others)}"
                yield Drop(host=host, expert=expert, deadline=deadline, why=why)

    def retired(self) -> Iterator[tuple[ExpertId, HostId]]:
        """The ready replicas that no placement should name."""
        for expert, hosts in self._view.ready.items():
            for host in hosts:
                if host not in self.replicas[expert]:
                    yield expert, host

    def _may_be_used(self, expert: ExpertId, host: HostId) -> bool:
        """Whether a router may hold a placement that names this replica."""
        if not (self._observed.is_settled and self._observed.is_history_known):
            return True
        return any(host in placement.replicas.get(expert, ()) for placement in self._observed.published)

    @property
    def awaits_routers(self) -> bool:
        """Whether a replica is only kept because a router may still use it."""
        return any(self._may_be_used(expert, host) for expert, host in self.retired())

    def stops(self) -> Iterator[StopHost]:
        """End the drained hosts that hold nothing: what they held was dropped, so no router can know of it."""
        for host in self._view.hosts:
            if host.status is HostStatus.DRAINING and self._observed.is_settled and not held(host):
                deadline = self._view.now + self._view.limits.stop_timeout_s
                yield StopHost(host=host.id, deadline=deadline, why="drained")
