"""Hosts as Ray actors: the only module of the control plane, with `actor`, that imports Ray.

The actors are detached and named, so that they outlive the controller and the next one finds them again.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.util import list_named_actors

from expertmesh.control.cluster import RunningHost
from expertmesh.errors import ConfigError
from expertmesh.hosts.actor import HostActor
from expertmesh.placement import HostInfo

if TYPE_CHECKING:
    from expertmesh.config import PoolSection
    from expertmesh.ids import HostId
    from expertmesh.tls import TlsFiles

NAMESPACE = "expertmesh"
RACK_LABEL = "rack"
"""The node label that says which nodes fail together."""


class RayCluster:
    """Starts each host as an actor with its pool's resources; Ray finds, or brings, the node. See `cluster.Cluster`."""

    def __init__(
        self, mesh: str, token: str, *, loopback: bool, tls: TlsFiles | None = None, faults: bool = False
    ) -> None:
        """`mesh` names the mesh whose hosts these are. `loopback` hosts can be reached from their own machine only.
        With `faults` they may be broken on purpose."""
        self._mesh = mesh
        self._token = token
        self._loopback = loopback
        self._faults = faults
        self._tls = tls
        self._actors: dict[HostId, Any] = {}

    async def start(self, host: HostId, pool: PoolSection, *, is_urgent: bool = True) -> RunningHost:
        """Waits as long as Ray needs to find a node: pending actors are what its autoscaler acts on."""
        options: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "max_restarts": 0}
        options["scheduling_strategy"] = "SPREAD"  # over machines: they share the work, and do not fail together
        if pool.accelerator:
            options["accelerator_type"] = pool.accelerator
        if pool.labels:
            options["label_selector"] = pool.labels
        actor = (
            ray.remote(HostActor)
            .options(name=f"{self._mesh}/{host}", namespace=NAMESPACE, lifetime="detached", **options)
            .remote(
                name=host,
                pool=pool.name,
                token=self._token,
                device=pool.device,
                memory_bytes=int(pool.memory) if pool.memory else None,
                memory_share=min(1.0, pool.gpus) if pool.gpus else 1 / pool.most_hosts,
                threads=max(1, int(pool.cpus)),
                loopback=self._loopback,
                is_urgent=is_urgent,
                faults=self._faults,
                tls=self._tls,
            )
        )
        self._actors[host] = actor
        try:
            running = _running(await actor.describe.remote())
        except ray.exceptions.RayError as error:
            self._actors.pop(host, None)
            raise ConfigError(f"a host of pool {pool.name!r} did not start: {_last_line(error)}") from error
        if self._loopback and running.node != ray.get_runtime_context().get_node_id():
            await self.stop(host)
            raise ConfigError(
                f"network.listen: a host of pool {pool.name!r} runs on another machine, which loopback does not reach; "
                "say `listen: node`"
            )
        return running

    async def running(self) -> list[RunningHost]:
        """The hosts that a controller before this one started."""
        found = []
        for named in await asyncio.to_thread(_hosts, self._mesh):
            try:
                actor = await asyncio.to_thread(ray.get_actor, named, NAMESPACE)
                host = _running(await actor.describe.remote())
            except (ray.exceptions.RayError, ValueError):
                continue  # it has just ended
            self._actors[host.info.id] = actor
            found.append(host)
        return found

    async def ended(self, host: HostId) -> str:
        actor = self._actors.get(host)
        if actor is None:
            return "it was stopped"
        try:
            await actor.live.remote()
        except ray.exceptions.RayError as error:
            if host not in self._actors:
                return "it was stopped"
            return _last_line(error).partition(" Worker exit type:")[0]  # the rest is advice on Ray
        return "it ended"

    async def stop(self, host: HostId) -> None:
        actor = self._actors.pop(host, None)
        if actor is not None:
            ray.kill(actor)

    async def save(self, state: bytes) -> None:
        await asyncio.to_thread(_internal_kv_put, self._key, state, True, namespace=NAMESPACE.encode())

    async def saved(self) -> bytes | None:
        state: bytes | None = await asyncio.to_thread(_internal_kv_get, self._key, namespace=NAMESPACE.encode())
        return state

    @property
    def _key(self) -> bytes:
        return f"controller/{self._mesh}".encode()


def end_hosts(mesh: str) -> None:
    """End the hosts of a mesh that is no more, rather than wait for their leases to run out."""
    for named in _hosts(mesh):
        with contextlib.suppress(ValueError):  # it has just ended
            ray.kill(ray.get_actor(named, NAMESPACE))


def _hosts(mesh: str) -> list[str]:
    """The names of a mesh's host actors."""
    named = list_named_actors(all_namespaces=True)
    return [of["name"] for of in named if of["namespace"] == NAMESPACE and of["name"].startswith(f"{mesh}/")]


def _running(described: dict[str, Any]) -> RunningHost:
    info = HostInfo(id=described["id"], address=described["address"], socket=described["socket"])
    return RunningHost(
        info=info,
        pool=described["pool"],
        node=described["node"],
        rack=described["labels"].get(RACK_LABEL, ""),
        process_id=described["process_id"],
    )


def _last_line(error: Exception) -> str:
    """Ray's errors carry a remote trace; its last line says what happened."""
    return str(error).strip().splitlines()[-1].strip()
