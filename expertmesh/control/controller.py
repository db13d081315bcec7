"""The controller: brings one mesh up, and answers those who ask about it. No Ray, no gRPC.

What runs the mesh from then on is its `Keeper`. All methods are called on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from expertmesh.control.keeper import Keeper
from expertmesh.errors import ExpertMeshError, NoControllerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expertmesh.checkpoint.recipe import CheckpointIndex
    from expertmesh.clock import Clock
    from expertmesh.config import MeshConfig
    from expertmesh.control.cluster import Cluster, HostControl
    from expertmesh.doubt import Doubt
    from expertmesh.placement import HostInfo, Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class StartUp:
    """How far the start has come, for those who wait."""

    phase: str = "reading the checkpoint"
    done: int = 0
    total: int = 0
    error: str | None = None
    """Set when the start has failed, for good."""
    ready: bool = False


class Controller:
    """Runs one mesh: `start` once, the rest at any time."""

    def __init__(
        self,
        config: MeshConfig,
        cluster: Cluster,
        connect: Callable[[HostInfo], HostControl],
        read_index: Callable[[], CheckpointIndex],
        clock: Clock,
    ) -> None:
        """`read_index` blocks; it is called once, in a thread."""
        self._config = config
        self._cluster = cluster
        self._connect = connect
        self._read_index = read_index
        self._clock = clock
        self._keeper: Keeper | None = None
        self._news = asyncio.Event()
        self.start_up = StartUp()

    async def start(self) -> None:
        """Bring the mesh up; it is kept from then on, until `stop`.

        Never raises for the user's sake: what goes wrong is in `start_up.error`.
        """
        try:
            index = await asyncio.to_thread(self._read_index)
            self._keeper = Keeper(self._config, index, self._cluster, self._connect, self._clock, self._announce)
            await self._keeper.bring_up(self._show)
        except ExpertMeshError as error:
            self._fail(str(error))
        except Exception as error:  # the actor's boundary: those who wait must hear of it, whatever it is
            self._fail(f"{type(error).__name__}: {error}")
            raise

    def _show(self, phase: str, done: int, total: int) -> None:
        self.start_up = replace(self.start_up, phase=phase, done=done, total=total)

    def _fail(self, error: str) -> None:
        self.start_up = replace(self.start_up, error=error)
        self._announce()

    def _announce(self) -> None:
        """Tell those who wait for a placement to look again."""
        self._news.set()
        self._news = asyncio.Event()

    def status(self) -> dict[str, Any]:
        """How far the start has come."""
        ready = self._keeper is not None and self._keeper.placement is not None
        return asdict(replace(self.start_up, ready=ready))

    async def wait_placement(self, router: str, newer_than: int, timeout_s: float) -> Placement | None:
        """The current placement once its epoch exceeds `newer_than`; None when that takes longer than `timeout_s`.

        `router` names who asks: a replica is kept until no router can still use it. Also returns, with None, when the
        start has failed.
        """
        deadline = self._clock.monotonic() + timeout_s
        while True:
            if self._keeper is not None:
                self._keeper.router_uses(router, newer_than)
                placement = self._keeper.placement
                if placement is not None and placement.epoch > newer_than:
                    if newer_than == 0:  # it holds none yet: from here on, what it is sent must not be dropped
                        self._keeper.router_uses(router, placement.epoch)
                    return placement
            left_s = deadline - self._clock.monotonic()
            if left_s <= 0 or self.start_up.error:
                return None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._news.wait()

    async def suspect(self, router: str, doubts: Sequence[Doubt]) -> None:
        """A router does not trust what these replicas answered."""
        if self._keeper is not None:
            self._keeper.suspect(router, doubts)

    async def hear_router(self, router: str, statistics: dict[str, Any]) -> None:
        """A router says how it goes, in plain JSON values: as often as it likes, at least once per lease."""
        if self._keeper is not None:
            self._keeper.routers.heard(router, statistics)

    async def report(self, what: str) -> Any:
        """The JSON behind /mesh/WHAT."""
        return await self._running().report(what)

    async def order(self, what: str, values: dict[str, Any]) -> Any:
        """Do what an operator asks for: scale, auto, drain, rebalance or fault.

        Raises ConfigError when it cannot be, BusyError when not just now, ReplicaUnavailableError when a host that is
        to be broken does not hear of it.
        """
        if what == "fault":
            return await self._running().inject(**values)
        return self._running().order(what, values)

    def _running(self) -> Keeper:
        if self._keeper is None:
            raise NoControllerError("the mesh is still starting; ask again when it is ready")
        return self._keeper

    async def leave(self) -> None:
        """Stop controlling; the hosts go on, for the controller that follows."""
        if self._keeper is not None:
            await self._keeper.leave()

    async def stop(self) -> None:
        """End all hosts."""
        if self._keeper is not None:
            await self._keeper.stop()
