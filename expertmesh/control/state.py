"""What the control plane knows of the world at one moment: hosts, their replicas, the placements in use. Values only.

The reconciler reads these and nothing else; the ledger makes them. They know neither how the facts were learned nor
what is wanted. Times are seconds of the controller's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from expertmesh.ids import ExpertId, HostId


class HostStatus(StrEnum):
    """Where a host is in its life. One that has ended is not in the picture at all: its id never comes back."""

    STARTING = "starting"
    """Has not reported yet."""
    READY = "ready"
    DRAINING = "draining"
    """Answers, but is to hold nothing more, and then to stop."""
    STOPPING = "stopping"
    UNREACHABLE = "unreachable"
    """Does not answer; it may do so again."""


class ReplicaStatus(StrEnum):
    """Where a replica is in its life. An expert that a host does not hold has none there."""

    LOADING = "loading"
    READY = "ready"
    """Loaded and self-tested."""
    DROPPING = "dropping"
    """A drop was ordered, so it may vanish at any moment."""
    FAILED = "failed"
    """Not held: the last load failed."""
    QUARANTINED = "quarantined"
    """Held, and doubted: no placement is to name it until it was verified."""
    CONDEMNED = "condemned"
    """Held, and known to answer wrongly: to be dropped, and loaded anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One expert on one host."""

    status: ReplicaStatus
    since: float
    until: float = float("inf")
    """LOADING, DROPPING: the order's deadline. FAILED: it is not tried again before."""
    failures: int = 0
    """Loads that failed in a row."""
    cause: str = ""
    """Of the last failure, or of the doubt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostState:
    """One host and what it holds."""

    id: HostId
    status: HostStatus
    since: float
    slots: tuple[int, ...]
    """Per shape of experts; empty until the host has reported."""
    replicas: Mapping[ExpertId, Replica] = field(repr=False)

    @property
    def is_serving(self) -> bool:
        """Whether its ready replicas answer."""
        return self.status in (HostStatus.READY, HostStatus.DRAINING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The membership of a placement that was published."""

    epoch: int
    at: float
    replicas: Mapping[ExpertId, tuple[HostId, ...]] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The whole picture."""

    hosts: Mapping[HostId, HostState]
    published: tuple[Published, ...] = ()
    """Oldest first, the current placement last. A controller that restarted may not know those before."""
    newest_epoch: int = 0
    """The greatest that was ever published, as far as is known; 0: none."""
    oldest_epoch: int = 0
    """No live router uses an older one; 0: not known."""
    is_settled: bool = True
    """False for a while after a restart, when orders of the controller before may still be on their way."""
    layer_shapes: tuple[int, ...] = ()
    """Per layer, which of a host's pools of slots its experts go to; empty when there is but one."""

    @property
    def current(self) -> Mapping[ExpertId, tuple[HostId, ...]]:
        """The replicas that the current placement names; none when it is not known."""
        return self.published[-1].replicas if self.published else {}

    @property
    def is_history_known(self) -> bool:
        """Whether every placement that a router may use is in `published`."""
        if self.newest_epoch == 0:
            return True
        return bool(self.published) and self.published[0].epoch <= self.oldest_epoch

    @property
    def doubted(self) -> frozenset[tuple[ExpertId, HostId]]:
        """The replicas that are held and not to be used."""
        statuses = (ReplicaStatus.QUARANTINED, ReplicaStatus.CONDEMNED)
        return frozenset(
            (expert, host.id)
            for host in self.hosts.values()
            for expert, replica in host.replicas.items()
            if replica.status in statuses
        )

    def banned(self, now: float) -> set[tuple[ExpertId, HostId]]:
        """The replicas that cannot be had just now, as the last load failed or what it loaded was wrong."""
        return {
            (expert, host.id)
            for host in self.hosts.values()
            for expert, replica in host.replicas.items()
            if replica.status is ReplicaStatus.CONDEMNED
            or (replica.status is ReplicaStatus.FAILED and replica.until > now)
        }

    def shape(self, expert: ExpertId) -> int:
        """The pool of slots that an expert goes to."""
        return self.layer_shapes[expert.layer] if self.layer_shapes else 0
