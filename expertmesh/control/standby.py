"""Hosts that are started and prepared, and hold nothing yet: a pool that keeps some grows in a moment.

To start a process takes seconds of a core, most of what it takes to add a host. Knows nothing of experts.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from expertmesh.errors import ExpertMeshError, ReplicaUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from expertmesh.config import PoolSection
    from expertmesh.control.cluster import Cluster, HostControl, RunningHost
    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.ids import HostId
    from expertmesh.placement import HostInfo


class Prepared(NamedTuple):
    """A host that knows which model it is for."""

    running: RunningHost
    control: HostControl


class Standby:
    """Starts hosts, and keeps those that are not needed yet."""

    def __init__(
        self, cluster: Cluster, connect: Callable[[HostInfo], HostControl], configuration: HostConfiguration
    ) -> None:
        self._cluster = cluster
        self._connect = connect
        self._configuration = configuration
        self._idle: dict[HostId, Prepared] = {}
        self._coming: Counter[str] = Counter()

    async def prepare(self, host: HostId, pool: PoolSection, *, is_urgent: bool = True) -> Prepared:
        """A new host. Raises what went wrong; nothing is left of it then."""
        try:
            running = await self._cluster.start(host, pool, is_urgent=is_urgent)
            control = self._connect(running.info)
            await control.configure(self._configuration)
        except (ExpertMeshError, asyncio.CancelledError):
            await self._cluster.stop(host)
            raise
        return Prepared(running, control)

    def take(self, pool: str) -> Prepared | None:
        """One that is ready, if there is any."""
        host = next((host for host, idle in self._idle.items() if idle.running.pool == pool), None)
        return None if host is None else self._idle.pop(host)

    def next_missing(self, pools: Iterable[PoolSection]) -> PoolSection | None:
        """A pool that should have one more, and to which none is coming yet."""
        there = Counter(idle.running.pool for idle in self._idle.values())
        return next((of for of in pools if there[of.name] < of.standby and not self._coming[of.name]), None)

    @property
    def hosts(self) -> frozenset[HostId]:
        """Those that are ready."""
        return frozenset(self._idle)

    async def add(self, host: HostId, pool: PoolSection) -> None:
        """Start one for later, and keep it until it ends or is taken. Raises what went wrong."""
        self._coming[pool.name] += 1
        try:
            prepared = await self.prepare(host, pool, is_urgent=False)
        finally:
            self._coming[pool.name] -= 1
        await self.keep(prepared)

    async def keep(self, prepared: Prepared) -> None:
        """Have a host that holds nothing stand by until it ends or is taken."""
        host = prepared.running.info.id
        self._idle[host] = prepared
        await self._cluster.ended(host)
        if (ended := self._idle.pop(host, None)) is not None:
            await ended.control.close()

    async def keep_alive(self) -> None:
        """Ask them all something: a host that nobody asks takes itself to be abandoned."""
        for idle in list(self._idle.values()):
            try:
                await idle.control.statistics()
            except ReplicaUnavailableError:
                continue  # its end will be noticed

    async def leave(self) -> list[HostId]:
        """Hang up on them; who they were."""
        idle, self._idle = self._idle, {}
        await asyncio.gather(*(of.control.close() for of in idle.values()))
        return list(idle)
