"""The controller as a Ray actor, tied to the router deployment: Serve starts it, restarts it and ends it."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from expertmesh.checkpoint.source import resolve
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.config import MeshConfig
from expertmesh.control.controller import Controller
from expertmesh.control.ray_cluster import RayCluster
from expertmesh.errors import ConfigError
from expertmesh.fault import NOT_ALLOWED
from expertmesh.signals import kill_soon
from expertmesh.tls import live_identity
from expertmesh.transport.grpc_control import GrpcHostControl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertmesh.checkpoint.recipe import CheckpointIndex
    from expertmesh.doubt import Doubt
    from expertmesh.placement import Placement


class ControllerActor:
    """The shell around `Controller`: methods only delegate."""

    def __init__(self, name: str, config: dict[str, Any], token: str) -> None:
        """`name` is the mesh's: hosts go by it. `config` is a MeshConfig as JSON."""
        mesh = MeshConfig.model_validate(config)
        tls = mesh.network.tls_files
        self._may_be_broken = mesh.faults

        def read_index() -> CheckpointIndex:
            if tls is not None:
                live_identity(tls)  # here, where those who wait for the start hear of what is wrong with the files
            from expertmesh.checkpoint.index import index_checkpoint  # takes seconds: it imports transformers

            index = index_checkpoint(
                resolve(mesh.model),
                mesh.dtype,
                weight_format=mesh.experts.weight_format,
                portable=mesh.experts.portable,
            )
            if mesh.gate is not None:
                for num_experts in index.num_experts:
                    mesh.gate.spec.for_layer(num_experts)  # here too, for the same reason
            return index

        self._controller = Controller(
            mesh,
            RayCluster(name, token, loopback=mesh.network.listen == "loopback", tls=tls, faults=mesh.faults),
            lambda host: GrpcHostControl(host, token, tls=tls),
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

    async def suspect(self, router: str, doubts: Sequence[Doubt]) -> None:
        await self._controller.suspect(router, doubts)

    async def hear_router(self, router: str, statistics: dict[str, Any]) -> None:
        await self._controller.hear_router(router, statistics)

    async def report(self, what: str) -> Any:
        return await self._controller.report(what)

    async def order(self, what: str, values: dict[str, Any]) -> Any:
        if what == "fault" and values["target"] == "controller":
            return self._break()
        return await self._controller.order(what, values)

    def _break(self) -> dict[str, Any]:
        """Be killed, if that is allowed."""
        if not self._may_be_broken:
            raise ConfigError(NOT_ALLOWED)
        kill_soon()
        return {"accepted": True, "process_id": os.getpid()}

    async def stop(self) -> None:
        """End all hosts. The controller is of no more use then."""
        await self._controller.stop()
