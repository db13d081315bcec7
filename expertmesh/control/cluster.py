"""What the controller needs of a cluster and of a host, as Protocols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expertmesh.checkpoint.recipe import ExpertRecipe
    from expertmesh.config import PoolSection
    from expertmesh.fault import Fault
    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.hosts.digest import ReplicaDigest
    from expertmesh.hosts.statistics import HostStatistics
    from expertmesh.ids import ExpertId, HostId
    from expertmesh.placement import HostInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningHost:
    """A host process that is there."""

    info: HostInfo
    pool: str
    node: str
    rack: str = ""
    process_id: int = 0


class Cluster(Protocol):
    """Starts and stops host processes, and keeps a note for the next controller: ray_cluster."""

    async def start(self, host: HostId, pool: PoolSection, *, is_urgent: bool = True) -> RunningHost:
        """Start one host of a pool, waiting for the machine that it needs. Raises ConfigError when it cannot.

        One that is not urgent leaves the cores to those that serve.
        """
        ...

    async def running(self) -> list[RunningHost]:
        """The hosts that a controller before this one started."""
        ...

    async def ended(self, host: HostId) -> str:
        """Wait until a host's process ends, however it does: why it did."""
        ...

    async def stop(self, host: HostId) -> None:
        """End a host's process. Idempotent."""
        ...

    async def save(self, state: bytes) -> None:
        """Keep a note, replacing the last one; it outlives the controller."""
        ...

    async def saved(self) -> bytes | None:
        """The note that was kept last."""
        ...


class HostControl(Protocol):
    """Orders to one host: transport.grpc_control. All raise ReplicaUnavailableError when it cannot be reached."""

    async def configure(self, configuration: HostConfiguration) -> tuple[int, ...]: ...
    async def load(self, expert: ExpertId, recipe: ExpertRecipe) -> ReplicaDigest: ...
    async def verify(self, expert: ExpertId) -> ReplicaDigest: ...
    async def drop(self, expert: ExpertId, *, not_after_s: float = 0.0) -> None: ...
    async def inject(self, faults: Sequence[Fault], seed: int) -> Mapping[str, int]: ...
    async def statistics(self) -> HostStatistics: ...
    async def close(self) -> None: ...
