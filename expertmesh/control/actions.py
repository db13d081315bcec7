"""The steps that the reconciler asks for, as values: what, where, why and until when.

Whoever carries them out keeps one promise, on which the reconciler's safety rests: a drop happens before its deadline
or never. Anything may happen twice, and a load may also happen late: both do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from expertmesh.ids import ExpertId, HostId


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much may happen at once, and for how long."""

    min_replicas: int = 1
    """Ready copies of every expert that are kept, once they are there."""
    loads_per_host: int = 4
    """More would take the host's disk and cores from the rows it computes."""
    loads_at_once: int = 16
    """Over all hosts: they share the network, or the file server, that they read from."""
    load_timeout_s: float = 120.0
    drop_timeout_s: float = 3.0
    """The next controller publishes nothing for so long: a drop of the one before may be on its way."""
    stop_timeout_s: float = 30.0
    publish_every_s: float = 0.5
    """Each placement goes to every router, so that many small steps are told together; what cannot wait does not."""
    retry_first_s: float = 1.0
    """A load that failed is tried again after this, then after twice that, and so on."""
    retry_longest_s: float = 60.0
    router_lease_s: float = 30.0
    """A router that was not heard of for so long is taken to be gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Read an expert into a free slot of a host and self-test it."""

    host: HostId
    expert: ExpertId
    deadline: float
    why: str = ""

    @property
    def key(self) -> str:
        return f"load {self.expert} on {self.host}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Free the slot of a replica that no router can know of any more."""

    host: HostId
    expert: ExpertId
    deadline: float
    why: str = ""

    @property
    def key(self) -> str:
        return f"drop {self.expert} on {self.host}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Make this the current placement, at once, and tell every router in its own time."""

    epoch: int
    replicas: Mapping[ExpertId, tuple[HostId, ...]] = field(repr=False)
    """All of them; an expert that nobody holds is missing."""
    why: str = ""

    @property
    def key(self) -> str:
        return f"publish epoch {self.epoch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopHost:
    """End a host that has been drained."""

    host: HostId
    deadline: float
    why: str = ""

    @property
    def key(self) -> str:
        return f"stop {self.host}"


Action = Load | Drop | Publish | StopHost
