"""Keeps a mesh: the loop that learns what is the case, asks what should be, and takes the next steps.

The decisions are not made here: `planner` says what is wanted, `reconciler` which step comes next, `scaling` how many
hosts there should be; `ledger` and `load` know what is the case.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from expertmesh.control import views
from expertmesh.control.actions import Drop, Limits, Load, Publish, StopHost
from expertmesh.control.capacity import check_drain
from expertmesh.control.doubts import Doubts
from expertmesh.control.growth import Growth
from expertmesh.control.journal import Journal
from expertmesh.control.ledger import Ledger
from expertmesh.control.load import LoadMeter
from expertmesh.control.members import ASK_EVERY_S, Members
from expertmesh.control.note import Memory, Note
from expertmesh.control.planner import PlanOptions
from expertmesh.control.progress import Watchdog
from expertmesh.control.publisher import Publisher
from expertmesh.control.reconciler import reconcile
from expertmesh.control.reports import Reports
from expertmesh.control.routers import Routers
from expertmesh.control.speed import SpeedMeter
from expertmesh.control.state import HostStatus
from expertmesh.control.tasks import Tasks
from expertmesh.control.wanted import plan_experts
from expertmesh.errors import CheckpointError, ConfigError, ExpertMeshError, ProtocolError, ReplicaUnavailableError
from expertmesh.fault import NOT_ALLOWED, Fault, FaultKind
from expertmesh.hosts.configuration import configuration_for
from expertmesh.ids import ExpertId, HostId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from expertmesh.checkpoint.recipe import CheckpointIndex
    from expertmesh.clock import Clock
    from expertmesh.config import MeshConfig, PoolSection
    from expertmesh.control.actions import Action
    from expertmesh.control.cluster import Cluster, HostControl, RunningHost
    from expertmesh.control.reconciler import Steps
    from expertmesh.control.state import HostState, Observed
    from expertmesh.control.wanted import Supply
    from expertmesh.doubt import Doubt
    from expertmesh.hosts.digest import ReplicaDigest
    from expertmesh.placement import HostInfo, Placement

logger = logging.getLogger(__name__)

PAUSE_PER_TURN = 4.0
"""Times as long as a turn took, nothing but other tasks runs; once as long while experts are short of copies."""
LEAVING = (HostStatus.DRAINING, HostStatus.STOPPING)


class Keeper:
    """Runs one mesh whose checkpoint is known, once it is brought up. All on one event loop."""

    def __init__(
        self,
        config: MeshConfig,
        index: CheckpointIndex,
        cluster: Cluster,
        connect: Callable[[HostInfo], HostControl],
        clock: Clock,
        published: Callable[[], None],
    ) -> None:
        """`published` is called when there is a new placement."""
        self._config = config
        self._index = index
        self._cluster = cluster
        self._clock = clock
        self._configuration = configuration_for(index, config.model)
        self._num_experts = [self._configuration.num_experts(shape) for shape in range(len(self._configuration.specs))]
        self._limits = Limits(min_replicas=config.experts.min_replicas)
        self._options = PlanOptions(min_replicas=config.experts.min_replicas)
        self._journal = Journal(clock)
        self.routers = Routers(self._limits.router_lease_s, clock)
        self._meter = LoadMeter(self._configuration.layer_experts, half_life_s=config.experts.half_life_s)
        self._speeds = SpeedMeter()
        self._ledger = Ledger(self._limits, self._now, layer_shapes=self._configuration.layer_specs)
        self._connect = connect
        self._tell = published
        self._changed = asyncio.Event()
        self._tasks = Tasks(self._changed.set)
        self._watchdog = Watchdog(self._now)
        self._join()
        self._desired: Mapping[ExpertId, tuple[HostId, ...]] = {}
        self._plan_at = 0.0
        self._broken: CheckpointError | None = None
        """What the checkpoint lacks, found before the mesh was up."""

    def _join(self) -> None:
        """Connect the parts that share the ledger."""
        self._members = Members(
            self._cluster,
            self._connect,
            self._configuration,
            self._ledger,
            self._meter,
            self._speeds,
            self._journal,
            self._tasks,
            self._clock,
            self._plan_soon,
        )
        self._publisher = Publisher(
            self._configuration.layer_experts, self._cluster, self._members, self._speeds, self._clock, self._tell
        )
        self._growth = Growth(
            self._config.pools,
            self._num_experts,
            self._limits.min_replicas,
            self._members,
            self._ledger,
            self._journal,
            self._tasks,
            self._clock,
            self._plan_soon,
        )
        self._doubts = Doubts(
            self._members, self._growth, self._ledger, self._journal, self._tasks, self._clock, self._plan_soon
        )
        self._reports = Reports(
            self._configuration,
            self._members,
            self._ledger,
            self._meter,
            self._speeds,
            self._publisher,
            self._journal,
            self._watchdog,
            self.routers,
            self._clock,
        )

    @property
    def placement(self) -> Placement | None:
        """The current one."""
        return self._publisher.current

    # --- start -------------------------------------------------------------------------------------------------------

    async def bring_up(self, show: Callable[[str, int, int], None]) -> None:
        """Start the hosts, or find those of a controller before, and load what they are to hold first.

        Raises ConfigError when a host does not start or the experts do not fit, CheckpointError when one cannot be
        read.
        """
        note = Note.from_bytes(await self._cluster.saved())
        if note is not None:
            self._members.named.update(note.memory.named)
        if found := await self._cluster.running():
            await self._take_over(found, note)
        there = Counter(host.pool for host in found)
        wanted = [pool for pool in self._config.pools for _ in range(pool.hosts - there[pool.name])]
        if self.placement is not None:
            wanted = []  # the scaler knows better by now
        done = 0

        async def start(pool: PoolSection, host: HostId) -> None:
            nonlocal done
            await self._members.start(host, pool)
            done += 1
            show("starting hosts", done, len(wanted))

        show("starting hosts", 0, len(wanted))
        await asyncio.gather(*(start(pool, self._members.new_name(pool.name)) for pool in wanted))
        if self.placement is None:
            self._plan("the first placement", self._ledger.observed(self._now))
        total = sum(map(len, self._desired.values()))
        while self.placement is None:
            steps = await self._turn()
            if self._broken is not None:
                raise self._broken
            show("loading experts", max(0, total - steps.remaining), total)
        self._tasks.start(self._keep())

    async def _take_over(self, found: list[RunningHost], note: Note | None) -> None:
        """Go on where the controller before this one stopped."""
        self._ledger = Ledger(self._limits, self._now, layer_shapes=self._configuration.layer_specs, restarted=True)
        self._join()
        if note is None:
            self._ledger.adopt(0, {}, self._now)  # a note comes before any placement
        else:
            self._members.named.update(note.memory.named)
            self._growth.scaler.recall(note.memory.sizes)
            self._ledger.adopt(note.epoch, note.replicas, self._now)
            self._desired = note.replicas
        standby = note.memory.standby if note is not None else frozenset()
        await asyncio.gather(*(self._members.take_over(host, stood_by=host.info.id in standby) for host in found))
        if note is not None:
            for expert, host in note.memory.doubted:
                self._ledger.condemned(host, expert, "it was doubted when the controller died", self._now)
            self._publisher.adopt(note)
        self._journal.add("take over", f"a controller was here before: {len(found)} hosts run")

    # --- the loop ----------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            try:
                await self._turn()
            except Exception as error:  # a fault of ours must not leave the mesh without its keeper
                logger.exception("a turn of the control loop failed")
                self._journal.add("fault", f"{type(error).__name__}: {error}")
                await asyncio.sleep(ASK_EVERY_S)

    async def _turn(self) -> Steps:
        """One look at everything, the steps that follow, and a pause until something may have changed."""
        self._changed.clear()
        now = self._now
        for host in self._members.due():
            self._tasks.start(self._members.ask(host))
        self._meter.tick(now)
        observed = self._ledger.observed(now)
        if self.placement is not None:
            self._growth.turn(observed)
            self._doubts.turn(observed)
        if now >= self._plan_at:
            observed = await self._replan(observed)
        steps = self._reconcile(observed)
        if not steps.actions and (renewal := self._publisher.renewal(observed)) is not None:
            self._begin(renewal, observed)
        if self.placement is not None and not self._publisher.remembers(memory := self._memory(observed)):
            self._tasks.start(self._publisher.remember(memory))
        # Large models make turns long: most of the time is for those who ask, whatever happens.
        pause_s = (1.0 if steps.is_urgent else PAUSE_PER_TURN) * (self._now - now)
        await asyncio.sleep(min(ASK_EVERY_S, pause_s))
        pause_s = min(ASK_EVERY_S, max(0.0, steps.wake_at - self._now))
        # Not wait_for: in Python 3.11 that may lose a cancellation, and then the loop would never end.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._changed.wait()
        return steps

    def _reconcile(self, observed: Observed) -> Steps:
        """Begin the steps that follow from what is the case and what is wanted."""
        steps = reconcile(self._desired, observed, self._limits, self._now)
        self._watchdog.turned(steps, self._now)
        if steps.blocked:
            self._journal.add("blocked", "; ".join(steps.blocked))
            self._desired = dict(observed.current)
        for action in steps.actions:
            self._begin(action, observed)
        return steps

    async def _replan(self, observed: Observed) -> Observed:
        """Weigh what is wanted against the load. What is the case then.

        It takes long for large models, and routers must hear of a host's end at once: so that comes first.
        """
        self._plan_at = self._now + self._config.experts.replan_s
        for action in reconcile(self._desired, observed, self._limits, self._now).actions:
            if isinstance(action, Publish):
                self._begin(action, observed)
                await self._publisher.told()
                observed = self._ledger.observed(self._now)
        stay = {id_ for id_, host in observed.hosts.items() if host.status not in LEAVING}
        must = observed.banned(self._now) or any(not stay.issuperset(hosts) for hosts in self._desired.values())
        if self.placement is not None and (self._config.experts.elastic or must):
            try:
                self._plan("the load", observed)
            except ConfigError as error:
                self._journal.add("short of slots", str(error))
        return observed

    def _plan(self, occasion: str, observed: Observed) -> None:
        """Ask the planner what is wanted, from what is measured."""
        supplies = [self._supply(state) for state in observed.hosts.values() if state.status is HostStatus.READY]
        banned = observed.banned(self._now)
        wanted = plan_experts(self._configuration, supplies, self._meter.loads(), self._desired, self._options, banned)
        if wanted.replicas != self._desired:
            self._desired = wanted.replicas
            summary = (
                f"{occasion}: {wanted.num_added} replicas more, {wanted.num_retired} fewer; the slowest host's time "
                f"is {wanted.imbalance:.2f} of the ideal; survives the loss of any one {wanted.survives}"
            )
            self._journal.add("plan", summary, changes=[views.change(change) for change in wanted.changes])

    def _supply(self, state: HostState) -> Supply:
        running = self._members[state.id].running
        cost = self._growth.pools[running.pool].cost if running.pool in self._growth.pools else 0.0
        return views.supply(state, running, self._speeds.rate(state.id), cost)

    def _plan_soon(self) -> None:
        self._plan_at = 0.0
        self._changed.set()

    # --- carrying out ------------------------------------------------------------------------------------------------

    def _begin(self, action: Action, observed: Observed) -> None:
        self._ledger.begun(action, self._now)
        if isinstance(action, Publish):
            self._journal.add("publish", action.why, epoch=action.epoch)
            self._tasks.start(self._publisher.publish(action, self._memory(observed)))
        else:
            self._tasks.start(self._carry_out(action))

    async def _carry_out(self, action: Load | Drop | StopHost) -> None:
        """Do it, and tell the ledger how it went."""
        try:
            async with asyncio.timeout(max(0.0, action.deadline - self._now)):
                digest = await self._do(action)
        except (ExpertMeshError, TimeoutError) as error:
            cause = str(error) or "no answer before the deadline"
            self._ledger.failed(action, cause, self._now)
            self._journal.add("failed", f"{action.key}: {cause}")
            if isinstance(error, (CheckpointError, ProtocolError)):
                self._plan_soon()  # another host may be able to
            if self.placement is None and isinstance(error, CheckpointError):
                self._broken = error
        else:
            self._ledger.done(action, self._now)
            if isinstance(action, Load) and digest is not None:
                self._doubts.loaded(action.expert, action.host, digest)
        self._changed.set()

    async def _do(self, action: Load | Drop | StopHost) -> ReplicaDigest | None:
        """Of a load, what was loaded."""
        if action.host not in self._members:
            raise ReplicaUnavailableError(action.host, "it is gone")
        member = self._members[action.host]
        if isinstance(action, Load):
            return await member.control.load(action.expert, self._index.recipes[action.expert])
        if isinstance(action, Drop):
            await member.control.drop(action.expert, not_after_s=member.host_time(action.deadline))
            self._doubts.dropped(action.expert, action.host)
        else:
            await self._cluster.stop(action.host)
        return None

    # --- what others ask ---------------------------------------------------------------------------------------------

    def router_uses(self, router: str, epoch: int) -> None:
        """A router holds the placement of this epoch; 0: none yet."""
        self._ledger.router_uses(router, epoch, self._now)
        self._changed.set()

    def suspect(self, router: str, doubts: Iterable[Doubt]) -> None:
        """A router does not trust what these replicas answered."""
        self._doubts.suspect(router, doubts)

    async def report(self, what: str) -> Any:
        """What /mesh/WHAT answers."""
        return await self._reports.of(what)

    def order(self, what: str, values: dict[str, Any]) -> Any:
        """What an operator asks for. Raises ConfigError when it cannot be."""
        now = self._now
        if what == "scale":
            self._growth.scaler.scale(values["pool"], values["hosts"], now)
            self._journal.add("asked", f"scale pool {values['pool']} to {values['hosts']} hosts")
        elif what == "auto":
            self._growth.scaler.auto(values["pool"])
            self._journal.add("asked", f"pool {values['pool']} follows its load again")
        elif what == "drain":
            host = HostId(values["host"])
            check_drain(host, self._ledger.observed(now), self._num_experts, self._limits.min_replicas)
            self._journal.add("asked", f"drain host {host}")
            self._growth.drain(host)
        else:
            assert what == "rebalance", what
            self._journal.add("asked", "rebalance")
        self._plan_soon()
        return {"accepted": True}

    async def inject(self, target: str, faults: Sequence[Mapping[str, Any]], seed: int) -> Any:
        """Have a host misbehave from now on: how often it did so far, by kind. Raises ConfigError."""
        if not self._config.faults:
            raise ConfigError(NOT_ALLOWED)
        if (host := HostId(target)) not in self._members:
            raise ConfigError(f"target: {target!r} is no host; there are {', '.join(self._members)}")
        given = [Fault(**{**fault, "kind": FaultKind(fault["kind"])}) for fault in faults]
        self._journal.add("asked", f"break host {host}: {', '.join(fault.kind for fault in given) or 'no more'}")
        return {"accepted": True, "fired": await self._members[host].control.inject(given, seed)}

    async def stop(self) -> None:
        """End everything, the hosts too."""
        await asyncio.gather(*(self._cluster.stop(host) for host in await self.leave()))

    async def leave(self) -> list[HostId]:
        """End whatever is under way, and leave the hosts, which are these, to the controller that follows."""
        await self._tasks.cancel()
        return await self._members.leave()

    def _memory(self, observed: Observed) -> Memory:
        """What the next controller cannot learn from hosts."""
        named, sizes, standby = dict(self._members.named), self._growth.scaler.sizes(), self._members.standby.hosts
        return Memory(named=named, sizes=sizes, standby=standby, doubted=observed.doubted)

    @property
    def _now(self) -> float:
        return self._clock.monotonic()
