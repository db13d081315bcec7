"""The controller's lines to its hosts: starts them, asks them what they do, notices when they end.

Feeds the ledger and the load meter; decides nothing. Its invariant: a host is a member from the moment that it runs
until its process has ended, and the ledger knows of both.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmesh.control.scaling import PoolHost
from expertmesh.control.standby import Prepared, Standby
from expertmesh.control.state import HostStatus, ReplicaStatus
from expertmesh.errors import ExpertMeshError, ReplicaUnavailableError
from expertmesh.ids import HostId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from expertmesh.clock import Clock
    from expertmesh.config import PoolSection
    from expertmesh.control.cluster import Cluster, HostControl, RunningHost
    from expertmesh.control.journal import Journal
    from expertmesh.control.ledger import Ledger
    from expertmesh.control.load import LoadMeter
    from expertmesh.control.speed import SpeedMeter
    from expertmesh.control.state import HostState
    from expertmesh.control.tasks import Tasks
    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.hosts.statistics import HostStatistics
    from expertmesh.placement import HostInfo

ASK_EVERY_S = 0.5
UNREACHABLE_S = 3.0
"""A host that has not said for so long what it does is taken to be unreachable."""


@dataclass(slots=True)
class Member:
    """A host that runs."""

    running: RunningHost
    control: HostControl
    heard_at: float
    """When its last report arrived."""
    statistics: HostStatistics | None = None
    busy: float = 0.0
    """Share of the time between its last two reports that it computed."""
    is_asked: bool = False
    """Whether an answer is under way."""

    def host_time(self, at: float) -> float:
        """Our time `at` by the host's own clock, or a little earlier."""
        assert self.statistics is not None
        return self.statistics.at_s + at - self.heard_at


class Members:
    """All hosts that run or are being started."""

    def __init__(
        self,
        cluster: Cluster,
        connect: Callable[[HostInfo], HostControl],
        configuration: HostConfiguration,
        ledger: Ledger,
        meter: LoadMeter,
        speeds: SpeedMeter,
        journal: Journal,
        tasks: Tasks,
        clock: Clock,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when there is something new to act on: a host has come or gone."""
        self._cluster = cluster
        self._connect = connect
        self._configuration = configuration
        self.standby = Standby(cluster, connect, configuration)
        self._ledger = ledger
        self._meter = meter
        self._speeds = speeds
        self._journal = journal
        self._tasks = tasks
        self._clock = clock
        self._changed = changed
        self._members: dict[HostId, Member] = {}
        self._starting: dict[HostId, str] = {}
        self.named: dict[str, int] = {}
        """Per pool, how many hosts were ever named: a name is not used twice."""

    def __getitem__(self, host: HostId) -> Member:
        return self._members[host]

    def __contains__(self, host: HostId) -> bool:
        return host in self._members

    def __iter__(self) -> Iterator[HostId]:
        return iter(sorted(self._members))

    def new_name(self, pool: str) -> HostId:
        """Of a host that is to be started."""
        number = self.named.get(pool, 0)
        self.named[pool] = number + 1
        return HostId(f"{pool}-{number}")

    async def start(self, host: HostId, pool: PoolSection) -> None:
        """Start a host and prepare it for the model. Raises what went wrong."""
        self._starting[host] = pool.name
        try:
            prepared = await self.standby.prepare(host, pool)
        finally:
            del self._starting[host]
        await self.admit(prepared)

    async def admit(self, prepared: Prepared) -> None:
        """Have a host take part from now on."""
        self._welcome(prepared.running, prepared.control)
        await self.ask(prepared.running.info.id)
        self._changed()

    async def take_over(self, running: RunningHost, *, stood_by: bool) -> None:
        """A host that a controller before this one started; it stands by again if it did and holds nothing."""
        host = running.info.id
        number = host.rpartition("-")[2]
        if number.isdecimal():
            self.named[running.pool] = max(self.named.get(running.pool, 0), int(number) + 1)
        control = self._connect(running.info)
        try:
            async with asyncio.timeout(UNREACHABLE_S):
                statistics = await control.statistics()
                if not statistics.slots:  # that controller died while it started the host
                    await control.configure(self._configuration)
        except (ReplicaUnavailableError, TimeoutError):
            stood_by = False
        except ExpertMeshError as error:
            self._journal.add("failed", f"start of {host}: {error}", host=host)
            await self._cluster.stop(host)
            return
        if stood_by and not statistics.replicas:
            self._tasks.start(self.standby.keep(Prepared(running, control)))
            return
        self._welcome(running, control)
        await self.ask(host)

    def _welcome(self, running: RunningHost, control: HostControl) -> None:
        now = self._clock.monotonic()
        self._members[running.info.id] = Member(running, control, heard_at=now)
        self._ledger.host_started(running.info.id, now)
        self._tasks.start(self._mourn(running.info.id))

    async def _mourn(self, host: HostId) -> None:
        """Wait for the end of a host's process, and forget it then."""
        cause = await self._cluster.ended(host)
        member = self._members.pop(host, None)
        if member is None:
            return
        self._journal.add("host ended", f"{host}: {cause}", host=host)
        self._ledger.host_gone(host)
        self._meter.forget(host)
        self._speeds.forget(host)
        self._changed()
        await member.control.close()

    def due(self) -> list[HostId]:
        """The hosts whose report is due, each to be passed to `ask`; marks those that have been silent for long."""
        now = self._clock.monotonic()
        due = []
        for host, member in self._members.items():
            if now - member.heard_at > UNREACHABLE_S:
                self._ledger.host_unreachable(host, now)
            if not member.is_asked and now - member.heard_at >= ASK_EVERY_S:
                due.append(host)
        return due

    async def ask(self, host: HostId) -> None:
        """Hear from a host what it holds and has done."""
        if (member := self._members.get(host)) is None:
            return
        member.is_asked = True
        asked_at = self._clock.monotonic()
        try:
            async with asyncio.timeout(UNREACHABLE_S):
                statistics = await member.control.statistics()
        except (ReplicaUnavailableError, TimeoutError):
            return
        finally:
            member.is_asked = False
        if statistics.done.rows and (member.statistics is None or not member.statistics.done.rows):
            self._journal.add("first row", f"{host} serves", host=host)
        before = member.statistics
        if before is not None and statistics.at_s > before.at_s:
            member.busy = (statistics.done.busy_s - before.done.busy_s) / (statistics.at_s - before.at_s)
        member.statistics, member.heard_at = statistics, self._clock.monotonic()
        self._ledger.report(host, statistics.slots, [expert for expert, _ in statistics.replicas], asked_at)
        self._meter.observe(host, statistics.at_s, statistics.replicas)
        self._speeds.observe(host, member.running.pool, statistics.at_s, statistics.done)

    def pools(self, states: Mapping[HostId, HostState]) -> dict[str, list[PoolHost]]:
        """All hosts as scaling sees them."""
        pools: dict[str, list[PoolHost]] = {}
        for host, pool in self._starting.items():
            pools.setdefault(pool, []).append(PoolHost(host=host, status=HostStatus.STARTING))
        for host, member in self._members.items():
            if (state := states.get(host)) is None:
                continue
            ready = sum(replica.status is ReplicaStatus.READY for replica in state.replicas.values())
            pools.setdefault(member.running.pool, []).append(
                PoolHost(
                    host=host,
                    status=state.status,
                    slots=state.slots,
                    replicas=ready,
                    busy=member.busy,
                    rate=self._speeds.rate(host),
                )
            )
        return pools

    async def leave(self) -> list[HostId]:
        """Hang up on all hosts; who they were."""
        members, self._members = self._members, {}
        await asyncio.gather(*(member.control.close() for member in members.values()))
        return [*members, *await self.standby.leave()]
