"""The controller: brings hosts up, loads experts into them, publishes placements. No Ray, no gRPC.

Owns the desired state and the current placement. Its invariant: a placement names only replicas that are loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from expertmesh.control.planner import Inventory, spread
from expertmesh.errors import ExpertMeshError
from expertmesh.hosts.configuration import configuration_for
from expertmesh.ids import ExpertId, HostId
from expertmesh.placement import HostInfo, Placement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expertmesh.checkpoint.recipe import CheckpointIndex, ExpertRecipe
    from expertmesh.clock import Clock
    from expertmesh.config import MeshConfig, PoolSection
    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.hosts.statistics import HostStatistics

LOADS_AT_ONCE = 4
"""Experts that one host reads at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningHost:
    """A host that the cluster has started."""

    info: HostInfo
    pool: str
    node: str
    process_id: int


class Cluster(Protocol):
    """Starts and stops host processes."""

    async def start(self, host: HostId, pool: PoolSection) -> RunningHost:
        """Start one host of a pool, waiting for the machine that it needs. Raises ConfigError when it cannot."""
        ...

    async def stop(self, host: HostId) -> None: ...


class HostControl(Protocol):
    """Orders to one host; see transport.grpc_control."""

    async def configure(self, configuration: HostConfiguration) -> tuple[int, ...]: ...
    async def load(self, expert: ExpertId, recipe: ExpertRecipe) -> None: ...
    async def drop(self, expert: ExpertId) -> None: ...
    async def statistics(self) -> HostStatistics: ...
    async def close(self) -> None: ...


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
    """Runs one mesh. All methods are called on one event loop."""

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
        self._hosts: dict[HostId, RunningHost] = {}
        self._controls: dict[HostId, HostControl] = {}
        self._placement: Placement | None = None
        self._published = asyncio.Event()
        self._decisions: list[dict[str, Any]] = []
        self.start_up = StartUp()

    async def start(self) -> None:
        """Bring the mesh up. Never raises: what goes wrong is in `start_up.error`."""
        try:
            await self._start()
        except ExpertMeshError as error:
            self._fail(str(error))
        except Exception as error:  # the actor's boundary: those who wait must hear of it, whatever it is
            self._fail(f"{type(error).__name__}: {error}")
            raise

    def _fail(self, error: str) -> None:
        self.start_up = replace(self.start_up, error=error)
        self._published.set()

    async def _start(self) -> None:
        index = await asyncio.to_thread(self._read_index)
        configuration = configuration_for(index, self._config.model)

        wanted = [(HostId(f"{pool.name}-{i}"), pool) for pool in self._config.pools for i in range(pool.hosts)]
        self.start_up = StartUp(phase="starting hosts", total=len(wanted))
        slots = await asyncio.gather(*(self._start_host(host, pool, configuration) for host, pool in wanted))
        self._hosts = {host: self._hosts[host] for host, _ in wanted}  # they came in any order
        inventory = [Inventory(host=host, slots=n) for (host, _), n in zip(wanted, slots, strict=True)]
        replicas = spread(configuration, inventory, self._config.experts.min_replicas)

        self.start_up = StartUp(phase="loading experts", total=sum(len(hosts) for hosts in replicas.values()))
        held = {host: [expert for expert, hosts in replicas.items() if host in hosts] for host in self._hosts}
        await asyncio.gather(*(self._load(host, experts, index) for host, experts in held.items()))
        hosts = tuple(self._hosts[host].info for host, _ in wanted)
        self._publish(
            Placement(epoch=1, hosts=hosts, num_experts=index.num_experts, replicas=replicas),
            why=f"first placement: {len(replicas)} experts spread over {len(hosts)} hosts",
        )
        self.start_up = replace(self.start_up, phase="ready", ready=True)

    async def _start_host(self, host: HostId, pool: PoolSection, configuration: HostConfiguration) -> tuple[int, ...]:
        running = await self._cluster.start(host, pool)
        control = self._connect(running.info)
        self._hosts[host], self._controls[host] = running, control
        slots = await control.configure(configuration)
        self.start_up = replace(self.start_up, done=self.start_up.done + 1)
        return slots

    async def _load(self, host: HostId, experts: Sequence[ExpertId], index: CheckpointIndex) -> None:
        limit = asyncio.Semaphore(LOADS_AT_ONCE)

        async def load(expert: ExpertId) -> None:
            async with limit:
                await self._controls[host].load(expert, index.recipes[expert])
            self.start_up = replace(self.start_up, done=self.start_up.done + 1)

        await asyncio.gather(*(load(expert) for expert in experts))

    def _publish(self, placement: Placement, why: str) -> None:
        self._placement = placement
        self._decisions.append({"time": self._clock.wall(), "epoch": placement.epoch, "what": why})
        self._published.set()
        self._published = asyncio.Event()

    async def wait_placement(self, newer_than: int, timeout_s: float) -> Placement | None:
        """The current placement once its epoch exceeds `newer_than`; None when that takes longer than `timeout_s`.

        Also returns, with None, when the start has failed.
        """
        deadline = self._clock.monotonic() + timeout_s
        while self._placement is None or self._placement.epoch <= newer_than:
            left_s = deadline - self._clock.monotonic()
            if left_s <= 0 or self.start_up.error:
                return None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._published.wait(), left_s)
        return self._placement

    async def report(self, what: str) -> Any:
        """The JSON behind /mesh/WHAT: hosts, placement, load or decisions."""
        if what == "placement":
            return self._placement.to_json() if self._placement else {}
        if what == "decisions":
            return list(self._decisions)
        statistics = dict(
            zip(
                self._controls,
                await asyncio.gather(
                    *(control.statistics() for control in self._controls.values()), return_exceptions=True
                ),
                strict=True,
            )
        )
        if what == "hosts":
            return [self._describe(host, statistics[host]) for host in self._hosts]
        assert what == "load", what
        rows = dict.fromkeys(self._placement.replicas, 0) if self._placement else {}
        for reported in statistics.values():
            if not isinstance(reported, BaseException):
                for expert, computed in reported.replicas:
                    rows[expert] = rows.get(expert, 0) + computed
        num_experts = self._placement.num_experts if self._placement else ()
        layers = [[rows.get(ExpertId(layer, i), 0) for i in range(n)] for layer, n in enumerate(num_experts)]
        return {"layers": layers}

    def _describe(self, host: HostId, statistics: HostStatistics | BaseException) -> dict[str, Any]:
        running = self._hosts[host]
        known: dict[str, Any] = {"state": "unreachable", "slots": None, "replicas": None, "rate": None}
        if not isinstance(statistics, BaseException):
            rate = statistics.rows / statistics.busy_s if statistics.busy_s else None
            known = {"state": "ready", "slots": sum(statistics.slots), "replicas": len(statistics.replicas)}
            known |= {"rate": rate, "rows": statistics.rows, "launches": statistics.launches}
        return {"id": host, "pool": running.pool, "node": running.node, "pid": running.process_id, **known} | {
            "address": running.info.address
        }

    def status(self) -> dict[str, Any]:
        """How far the start has come."""
        return asdict(self.start_up)

    async def stop(self) -> None:
        """Stop all hosts."""
        await asyncio.gather(*(control.close() for control in self._controls.values()))
        await asyncio.gather(*(self._cluster.stop(host) for host in self._hosts))
