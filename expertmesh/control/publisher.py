"""What routers are told: placements made from memberships, with how to reach each host and how fast it is.

Owns the current placement. Its invariant: the note for the next controller never knows less than a router does, unless
there is nowhere to keep it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from expertmesh.control import views
from expertmesh.control.actions import Publish
from expertmesh.control.note import Note
from expertmesh.placement import Placement, TimeModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from expertmesh.clock import Clock
    from expertmesh.control.cluster import Cluster
    from expertmesh.control.members import Members
    from expertmesh.control.note import Memory
    from expertmesh.control.speed import SpeedMeter
    from expertmesh.control.state import Observed
    from expertmesh.ids import ExpertId, HostId

MODELS_CHANGED = 0.1
"""Routers are told anew how fast hosts are when a launch on one has come to take longer or shorter by this part."""
MODELS_EVERY_S = 2.0
SAVE_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


class Publisher:
    """Publishes one placement after the other."""

    def __init__(
        self,
        num_experts: tuple[int, ...],
        cluster: Cluster,
        members: Members,
        speeds: SpeedMeter,
        clock: Clock,
        published: Callable[[], None],
    ) -> None:
        """`published` is called when there is a new placement."""
        self._num_experts = num_experts
        self._cluster = cluster
        self._members = members
        self._speeds = speeds
        self._clock = clock
        self._published = published
        self._published_at = 0.0
        self._turns = asyncio.Lock()
        self._note: Note | None = None
        self.current: Placement | None = None

    async def told(self) -> None:
        """Return once what is being published is."""
        await asyncio.sleep(0)  # a publication that was just begun takes its turn first
        async with self._turns:
            return

    async def publish(self, action: Publish, memory: Memory) -> None:
        """Make it the current placement; in the order of the calls. `memory` is for the note."""
        async with self._turns:
            await self._save(Note(epoch=action.epoch, replicas=action.replicas, memory=memory))
            self.current = self._placement(action.epoch, action.replicas)
            self._published_at = self._clock.monotonic()
            self._published()

    async def remember(self, memory: Memory) -> None:
        """Keep this for the next controller, if it is new."""
        async with self._turns:
            if self._note is not None and self._note.memory != memory:
                await self._save(replace(self._note, memory=memory))

    async def _save(self, note: Note) -> None:
        """Keep the note, unless the cluster cannot just now: routers wait for no head that is away."""
        self._note = note
        try:
            async with asyncio.timeout(SAVE_TIMEOUT_S):
                await self._cluster.save(note.to_bytes())
        except TimeoutError:
            logger.warning("the note for the next controller could not be kept")

    def remembers(self, memory: Memory) -> bool:
        """Whether the note says so."""
        return self._note is not None and self._note.memory == memory

    def adopt(self, note: Note) -> None:
        """What a controller before this one published last is current still."""
        self._note = note
        self.current = self._placement(note.epoch, note.replicas)
        self._published()

    def _placement(self, epoch: int, replicas: Mapping[ExpertId, tuple[HostId, ...]]) -> Placement:
        models = self._time_models()
        hosts = tuple(replace(self._members[host].running.info, time_model=models[host]) for host in self._members)
        return Placement(
            epoch=epoch,
            hosts=hosts,
            num_experts=self._num_experts,
            replicas={expert: tuple(host for host in of if host in self._members) for expert, of in replicas.items()},
        )

    def _time_models(self) -> dict[HostId, TimeModel]:
        """How fast every host is; one that is not measured yet is taken for a usual one."""
        known = {host: self._speeds.time_model(host) for host in self._members}
        usual = views.usual(model for model in known.values() if model is not None)
        return {host: model or usual for host, model in known.items()}

    def renewal(self, observed: Observed) -> Publish | None:
        """The same membership once more, when hosts are not as fast as routers were told."""
        placement = self.current
        if placement is None or self._clock.monotonic() < self._published_at + MODELS_EVERY_S:
            return None
        if not (observed.is_settled and observed.published) or observed.newest_epoch != placement.epoch:
            return None
        models, told = self._time_models(), {host.id: host.time_model for host in placement.hosts}
        if not any(views.differ(models[host], told[host], MODELS_CHANGED) for host in models.keys() & told.keys()):
            return None
        why = "hosts are as fast as measured"
        return Publish(epoch=observed.newest_epoch + 1, replicas=observed.current, why=why)
