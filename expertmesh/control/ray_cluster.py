"""Hosts as Ray actors: the only module of the control plane, with `actor`, that imports Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray

from expertmesh.control.controller import RunningHost
from expertmesh.errors import ConfigError
from expertmesh.hosts.actor import HostActor
from expertmesh.placement import HostInfo

if TYPE_CHECKING:
    from expertmesh.config import PoolSection
    from expertmesh.ids import HostId


class RayCluster:
    """Starts each host as an actor with its pool's resources; Ray finds, or brings, the node."""

    def __init__(self, token: str, *, loopback: bool) -> None:
        """`loopback` hosts can be reached from their own machine only."""
        self._token = token
        self._loopback = loopback
        self._actors: dict[HostId, Any] = {}

    async def start(self, host: HostId, pool: PoolSection) -> RunningHost:
        """Waits as long as Ray needs to find a node: pending actors are what its autoscaler acts on."""
        options: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "max_restarts": 0}
        if pool.accelerator:
            options["accelerator_type"] = pool.accelerator
        if pool.labels:
            options["label_selector"] = pool.labels
        actor = (
            ray.remote(HostActor)
            .options(**options)
            .remote(
                token=self._token,
                device=pool.device,
                memory_bytes=int(pool.memory) if pool.memory else None,
                memory_share=min(1.0, pool.gpus) if pool.gpus else 1 / pool.hosts,
                threads=max(1, int(pool.cpus)),
                loopback=self._loopback,
            )
        )
        self._actors[host] = actor
        try:
            where = await actor.describe.remote()
        except ray.exceptions.RayError as error:
            raise ConfigError(f"a host of pool {pool.name!r} did not start: {_last_line(error)}") from error
        return RunningHost(
            info=HostInfo(id=host, address=where["address"]),
            pool=pool.name,
            node=where["node"],
            process_id=where["process_id"],
        )

    async def stop(self, host: HostId) -> None:
        actor = self._actors.pop(host, None)
        if actor is not None:
            ray.kill(actor)


def _last_line(error: Exception) -> str:
    """Ray's errors carry a remote trace; its last line says what happened."""
    return str(error).strip().splitlines()[-1].strip()
