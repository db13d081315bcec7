"""What /mesh/WHAT answers, put together from those who know. Changes nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from expertmesh.control import views
from expertmesh.control.progress import moves
from expertmesh.errors import NoControllerError

if TYPE_CHECKING:
    from expertmesh.clock import Clock
    from expertmesh.control.journal import Journal
    from expertmesh.control.ledger import Ledger
    from expertmesh.control.load import LoadMeter
    from expertmesh.control.members import Members
    from expertmesh.control.progress import Watchdog
    from expertmesh.control.publisher import Publisher
    from expertmesh.control.routers import Routers
    from expertmesh.control.speed import SpeedMeter
    from expertmesh.hosts.configuration import HostConfiguration


class Reports:
    """The mesh as others see it."""

    def __init__(
        self,
        configuration: HostConfiguration,
        members: Members,
        ledger: Ledger,
        meter: LoadMeter,
        speeds: SpeedMeter,
        publisher: Publisher,
        journal: Journal,
        watchdog: Watchdog,
        routers: Routers,
        clock: Clock,
    ) -> None:
        self._configuration = configuration
        self._members = members
        self._ledger = ledger
        self._meter = meter
        self._speeds = speeds
        self._publisher = publisher
        self._journal = journal
        self._watchdog = watchdog
        self._routers = routers
        self._clock = clock

    async def of(self, what: str) -> Any:
        """Of hosts, routers, placement, load, decisions or moves, as JSON. Of loads and hosts, as of now."""
        if what in ("hosts", "load"):
            await asyncio.gather(*(self._members.ask(host) for host in self._members))
        now = self._clock.monotonic()
        if what == "placement":
            if self._publisher.current is None:
                raise NoControllerError("there is no placement yet; ask again in a moment")
            return views.placement(self._publisher.current, self._configuration)
        if what == "routers":
            return self._routers.entries()
        if what == "decisions":
            return self._journal.entries()
        if what == "moves":
            under_way = moves(self._ledger.observed(now))
            return {"moves": [views.move(move, now) for move in under_way], "alarm": self._watchdog.alarm(now)}
        if what == "hosts":
            states = self._ledger.observed(now).hosts
            return [
                views.host(
                    states.get(host), self._members[host], self._speeds.time_model(host), self._speeds.rate(host)
                )
                for host in self._members
            ]
        assert what == "load", what
        rates = {host: self._speeds.rate(host) for host in self._members}
        return {"layers": self._meter.totals()} | views.load(self._publisher.current, self._meter.loads(), rates)
