"""Hosts come and go as the scaler decides: started, taken from those that stand by, drained.

Owns the starts under way. What hosts hold is no concern of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from expertmesh.control.scaling import PoolPolicy, Scaler, StartHost
from expertmesh.errors import ExpertMeshError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from expertmesh.clock import Clock
    from expertmesh.config import PoolSection
    from expertmesh.control.journal import Journal
    from expertmesh.control.ledger import Ledger
    from expertmesh.control.members import Members
    from expertmesh.control.state import Observed
    from expertmesh.control.tasks import Tasks
    from expertmesh.ids import HostId

STANDBY_EVERY_S = 5.0
CALM_S = 10.0
"""Hosts are started for later, one at a time, when no others have come or gone for so long: to start one takes seconds
of a core, and those that have just come are there because cores are short."""


class Growth:
    """Grows and shrinks the pools of one mesh."""

    def __init__(
        self,
        pools: Sequence[PoolSection],
        num_experts: Sequence[int],
        min_replicas: int,
        members: Members,
        ledger: Ledger,
        journal: Journal,
        tasks: Tasks,
        clock: Clock,
        changed: Callable[[], None],
    ) -> None:
        """`num_experts`: per shape, how many the model has. `changed` is called when other hosts count than before."""
        self.pools = {pool.name: pool for pool in pools}
        policies = [
            PoolPolicy(pool=pool.name, min_hosts=pool.fewest_hosts, max_hosts=pool.most_hosts, target=pool.target)
            for pool in pools
        ]
        self.scaler = Scaler(policies, num_experts, min_replicas)
        self._members = members
        self._ledger = ledger
        self._journal = journal
        self._tasks = tasks
        self._clock = clock
        self._changed = changed
        self._starts: dict[HostId, asyncio.Task[None]] = {}
        self._standby_at = 0.0
        self._busy_until = 0.0

    def turn(self, observed: Observed) -> None:
        """Begin what is to be done now."""
        now = self._clock.monotonic()
        steps = self.scaler.decide(self._members.pools(observed.hosts), now)
        if steps or self._starts:
            self._busy_until = now + CALM_S
        for step in steps:
            if isinstance(step, StartHost):
                self._grow(self.pools[step.pool], step.why)
            else:
                self._journal.add("drain host", f"{step.host}: {step.why}", host=step.host)
                self.drain(step.host)
        if now >= self._standby_at:
            self._standby_at = now + STANDBY_EVERY_S
            self._tasks.start(self._members.standby.keep_alive())
            if now >= self._busy_until and (pool := self._members.standby.next_missing(self.pools.values())):
                self._tasks.start(self._add_standby(self._members.new_name(pool.name), pool))

    def drain(self, host: HostId) -> None:
        """Have a host emptied and stopped; one that is still starting is stopped at once."""
        if host in self._starts:
            self._starts[host].cancel()
        else:
            self._ledger.host_draining(host, self._clock.monotonic())
            self._changed()

    def _grow(self, pool: PoolSection, why: str) -> None:
        """One more host: one that stands by, or a new one."""
        if (ready := self._members.standby.take(pool.name)) is not None:
            host = ready.running.info.id
            self._journal.add("start host", f"{host}, which stood by: {why}", host=host)
            self._tasks.start(self._members.admit(ready))
            return
        host = self._members.new_name(pool.name)
        self._journal.add("start host", f"{host}: {why}", host=host)
        self._starts[host] = self._tasks.start(self._start(host, pool))

    async def _start(self, host: HostId, pool: PoolSection) -> None:
        """Should it fail, the scaler asks for another in a while."""
        began = self._clock.monotonic()
        try:
            await self._members.start(host, pool)
        except ExpertMeshError as error:
            self.scaler.start_failed(pool.name, self._clock.monotonic())
            self._journal.add("failed", f"start of {host}: {error}", host=host)
        else:
            self.scaler.start_succeeded(pool.name)
            self._journal.add("host ready", f"{host}, after {self._clock.monotonic() - began:.1f} s", host=host)
        finally:
            del self._starts[host]

    async def _add_standby(self, host: HostId, pool: PoolSection) -> None:
        try:
            await self._members.standby.add(host, pool)
        except ExpertMeshError as error:  # there will be another attempt
            self._journal.add("failed", f"start of {host}, to stand by: {error}", host=host)
