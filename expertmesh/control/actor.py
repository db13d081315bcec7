"""The controller as a Ray actor, tied to the router deployment: Serve starts it, restarts it and ends it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from expertmesh.checkpoint.source import resolve
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.config import MeshConfig
from expertmesh.control.controller import Controller
from expertmesh.control.ray_cluster import RayCluster
from expertmesh.transport.grpc_control import GrpcHostControl

if TYPE_CHECKING:
    from expertmesh.checkpoint.recipe import CheckpointIndex
    from expertmesh.placement import Placement


class ControllerActor:
    """The shell around `Controller`: methods only delegate."""

    def __init__(self, name: str, config: dict[str, Any], token: str) -> None:
        """`name` is the mesh's: hosts go by it. `config` is a MeshConfig as JSON."""
        mesh = MeshConfig.model_validate(config)

        def read_index() -> CheckpointIndex:
            from expertmesh.checkpoint.index import index_checkpoint  # takes seconds: it imports transformers

            return index_checkpoint(resolve(mesh.model), mesh.dtype)

        self._controller = Controller(
            mesh,
            RayCluster(name, token, loopback=mesh.network.listen == "loopback"),
            lambda host: GrpcHostControl(host, token),
            read_index,
            SYSTEM_CLOCK,
        )
        self._start: asyncio.Task[None] | None = None

    async def status(self) -> dict[str, Any]:
        """How far the start has come. The first call begins it: an actor's `__init__` runs outside its event loop."""
        if self._start is None:
            self._start = asyncio.create_task(self._controller.start())
        return self._controller.status()

    async def wait_placement(self, router: str, newer_than: int, timeout_s: float) -> Placement | None:
        return await self._controller.wait_placement(router, newer_than, timeout_s)

    async def report(self, what: str) -> Any:
        return await self._controller.report(what)

    async def order(self, what: str, values: dict[str, Any]) -> Any:
        return await self._controller.order(what, values)

    async def stop(self) -> None:
        """End all hosts. The controller is of no more use then."""
        await self._controller.stop()
