"""The ledger: what the controller was told, set against what it ordered, and the picture that follows from both.

Owns every fact that the reconciler sees. It knows neither what is wanted nor how messages travel: they may be lost,
late, repeated or out of order. Its invariant: a replica reads as ready only while no drop can be on its way to it, and
nobody doubts it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from expertmesh.control.actions import Drop, Load, Publish, StopHost
from expertmesh.control.state import HostState, HostStatus, Observed, Published, Replica, ReplicaStatus

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from expertmesh.control.actions import Action, Limits
    from expertmesh.ids import ExpertId, HostId

NEVER = float("-inf")
NO_ANSWER = "no answer before the deadline"


@dataclass(slots=True)
class _Replica:
    """What is known of one expert on one host."""

    since: float
    held: bool = False
    known_at: float = NEVER
    """Reports that were not asked for after this may be older than what is known."""
    order: Load | Drop | None = None
    failures: int = 0
    retry_at: float = NEVER
    cause: str = ""
    doubt: str = ""
    """Why it is not to be used, while it is not."""
    is_condemned: bool = False
    """The doubt is well founded."""
    setbacks: int = 0
    """How often it was condemned."""


@dataclass(slots=True)
class _Host:
    """What is known of one host."""

    since: float
    slots: tuple[int, ...] = ()
    asked_at: float = NEVER
    """When its last report was asked for."""
    is_draining: bool = False
    unreachable_since: float | None = None
    stop: StopHost | None = None
    replicas: dict[ExpertId, _Replica] = field(default_factory=dict)

    def status(self) -> HostStatus:
        if self.stop is not None:
            return HostStatus.STOPPING
        if self.unreachable_since is not None:
            return HostStatus.UNREACHABLE
        if self.is_draining:
            return HostStatus.DRAINING
        return HostStatus.READY if self.slots else HostStatus.STARTING


class Ledger:
    """Takes in what happens, in any order; `observed` is the picture. All times are of one monotonic clock."""

    def __init__(
        self, limits: Limits, now: float, *, layer_shapes: tuple[int, ...] = (), restarted: bool = False
    ) -> None:
        """`restarted`: a controller ran before, whose last orders and placements nobody remembers."""
        self._limits = limits
        self._layer_shapes = layer_shapes
        self._hosts: dict[HostId, _Host] = {}
        self._published: list[Published] = []
        self._newest_epoch = 0
        self._routers: dict[str, tuple[int, float]] = {}
        self._orders_past_at = now + limits.drop_timeout_s if restarted else NEVER
        """No drop that the controller before ordered can be carried out any more."""
        self._routers_known_at = now + max(limits.router_lease_s, limits.drop_timeout_s) if restarted else NEVER
        """Every router was heard of, so that it is known which placements are in use."""
        self._settles_at = self._routers_known_at

    def host_started(self, host: HostId, now: float) -> None:
        """A host is being started, or was found running. It is ready from its first report on."""
        self._hosts.setdefault(host, _Host(since=now))

    def host_draining(self, host: HostId, now: float, *, draining: bool = True) -> None:
        """The host is to be emptied and stopped; or, with draining=False, is to stay after all."""
        known = self._hosts.get(host)
        if known is not None and known.is_draining != draining:
            known.is_draining, known.since = draining, now

    def host_unreachable(self, host: HostId, now: float) -> None:
        """The host does not answer. A report that was asked for after this takes it back."""
        known = self._hosts.get(host)
        if known is not None and known.unreachable_since is None:
            known.unreachable_since = known.since = now

    def host_gone(self, host: HostId) -> None:
        """The host's process has ended. For good: a host that replaces it has another id."""
        self._hosts.pop(host, None)

    def report(self, host: HostId, slots: tuple[int, ...], held: Collection[ExpertId], asked_at: float) -> None:
        """What a host said of itself, some time between `asked_at` and now."""
        known = self._hosts.get(host)
        if known is None or asked_at <= known.asked_at:
            return
        if not known.slots:
            known.since = asked_at
        known.slots, known.asked_at = slots, asked_at
        if known.unreachable_since is not None and asked_at > known.unreachable_since:
            known.unreachable_since, known.since = None, asked_at
        for expert in {*held, *known.replicas}:
            replica = known.replicas.setdefault(expert, _Replica(since=asked_at))
            if asked_at <= replica.known_at:
                continue
            if replica.order is not None and asked_at < replica.order.deadline:
                continue  # the order may yet change what the host saw
            if isinstance(replica.order, Load):
                self._load_failed(replica, NO_ANSWER, asked_at)
            self._settle(replica, held=expert in held, at=asked_at)
            if not replica.held and not replica.failures:
                del known.replicas[expert]

    def begun(self, action: Action, now: float) -> None:
        """An action is being carried out from now on."""
        if isinstance(action, Publish):
            self._published.append(Published(epoch=action.epoch, at=now, replicas=action.replicas))
            self._newest_epoch = max(self._newest_epoch, action.epoch)
        elif action.host not in self._hosts:
            return
        elif isinstance(action, StopHost):
            self._hosts[action.host].stop = action
            self._hosts[action.host].since = now
        else:
            replica = self._hosts[action.host].replicas.setdefault(action.expert, _Replica(since=now))
            replica.order, replica.since = action, now

    def done(self, action: Action, now: float) -> None:
        """An action was carried out, says the host. What answers no order that is open says nothing of the present."""
        if isinstance(action, StopHost):
            self.host_gone(action.host)
        elif replica := self._ordered(action):
            self._settle(replica, held=isinstance(action, Load), at=now)

    def failed(self, action: Action, cause: str, now: float) -> None:
        """An action failed, or nobody knows whether it did.

        Of a drop or a stop, its deadline will tell: until then, either may still happen.
        """
        replica = self._ordered(action)
        if replica is not None and isinstance(action, Load):
            self._load_failed(replica, cause, now)

    def _ordered(self, action: Action) -> _Replica | None:
        """The replica whose open order is `action`."""
        if isinstance(action, (Publish, StopHost)) or action.host not in self._hosts:
            return None
        replica = self._hosts[action.host].replicas.get(action.expert)
        return replica if replica is not None and replica.order == action else None

    def _load_failed(self, replica: _Replica, cause: str, now: float) -> None:
        replica.order, replica.since, replica.cause = None, now, cause
        pause_s = self._limits.retry_first_s * 2.0 ** min(replica.failures, 30)
        replica.retry_at = now + min(pause_s, self._limits.retry_longest_s)
        replica.failures += 1

    def _settle(self, replica: _Replica, *, held: bool, at: float) -> None:
        """Note what is certain from `at` on."""
        if held != replica.held or replica.order is not None:
            replica.since = at
        replica.held, replica.known_at, replica.order = held, at, None
        if held:
            replica.failures, replica.retry_at, replica.cause = 0, NEVER, ""
            return
        if replica.is_condemned:  # what the host loads next may be as bad: others are tried first
            replica.failures = replica.setbacks - 1
            self._load_failed(replica, replica.doubt, at)
        replica.doubt, replica.is_condemned = "", False

    def doubted(self, host: HostId, expert: ExpertId, cause: str, now: float) -> bool:
        """A replica is not to be used until it was verified: whether it was, up to now."""
        replica = self._ready(host, expert)
        if replica is None:
            return False
        replica.doubt, replica.since = cause, now
        return True

    def cleared(self, host: HostId, expert: ExpertId, now: float) -> None:
        """The doubt about a replica was unfounded."""
        replica = self._held(host, expert)
        if replica is not None and replica.doubt and not replica.is_condemned:
            replica.doubt, replica.since = "", now

    def condemned(self, host: HostId, expert: ExpertId, cause: str, now: float) -> bool:
        """A replica answers wrongly, and will until it is loaded anew: whether that is news."""
        replica = self._held(host, expert)
        if replica is None or replica.is_condemned:
            return False
        replica.doubt, replica.is_condemned, replica.since = cause, True, now
        replica.setbacks += 1
        return True

    def _held(self, host: HostId, expert: ExpertId) -> _Replica | None:
        known = self._hosts.get(host)
        replica = known.replicas.get(expert) if known is not None else None
        return replica if replica is not None and replica.held else None

    def _ready(self, host: HostId, expert: ExpertId) -> _Replica | None:
        replica = self._held(host, expert)
        return replica if replica is not None and replica.order is None and not replica.doubt else None

    def adopt(self, epoch: int, replicas: Mapping[ExpertId, tuple[HostId, ...]], now: float) -> None:
        """The placement that a controller before this one published last."""
        if epoch > self._newest_epoch or (epoch == self._newest_epoch and not self._published):
            self._newest_epoch = epoch
            self._published = [Published(epoch=epoch, at=now, replicas=replicas)]
            self._settles_at = self._orders_past_at  # no router need be asked which epoch comes next

    def router_uses(self, router: str, epoch: int, now: float) -> None:
        """A router holds this placement, or is being sent it and holds none yet. It is heard of once per lease."""
        known, _ = self._routers.get(router, (0, now))
        self._routers[router] = (max(known, epoch), now)
        if epoch > self._newest_epoch:  # a controller before this one published it; what we adopted is older still
            self._newest_epoch = epoch
            self._published = []
            self._settles_at = self._routers_known_at

    def router_left(self, router: str) -> None:
        """A router has ended."""
        self._routers.pop(router, None)

    def observed(self, now: float) -> Observed:
        """The picture at this moment."""
        for host in self._hosts.values():
            self._expire(host, now)
        oldest = self._forget_old_placements(now)
        serving = [host for host in self._hosts.values() if host.status() in (HostStatus.READY, HostStatus.DRAINING)]
        return Observed(
            hosts={id_: _picture(id_, host) for id_, host in self._hosts.items()},
            published=tuple(self._published),
            newest_epoch=self._newest_epoch,
            oldest_epoch=oldest if now >= self._routers_known_at else 0,
            is_settled=now >= self._settles_at and all(host.asked_at >= self._settles_at for host in serving),
            layer_shapes=self._layer_shapes,
        )

    def _expire(self, host: _Host, now: float) -> None:
        """Give up the loads and stops whose deadline has passed. Of a drop, only a report can say what became."""
        if host.stop is not None and now >= host.stop.deadline:
            host.stop, host.since = None, now
        for replica in host.replicas.values():
            if isinstance(replica.order, Load) and now >= replica.order.deadline:
                self._load_failed(replica, NO_ANSWER, now)

    def _forget_old_placements(self, now: float) -> int:
        """Forget routers that went silent and placements that nobody uses: the oldest epoch in use."""
        lease_s = self._limits.router_lease_s
        self._routers = {name: known for name, known in self._routers.items() if now - known[1] < lease_s}
        oldest = min((epoch for epoch, _ in self._routers.values() if epoch), default=self._newest_epoch)
        while len(self._published) > 1 and self._published[0].epoch < oldest:
            del self._published[0]
        return oldest


def _picture(id_: HostId, host: _Host) -> HostState:
    replicas = {expert: _replica(replica) for expert, replica in sorted(host.replicas.items()) if _exists(replica)}
    return HostState(id=id_, status=host.status(), since=host.since, slots=host.slots, replicas=replicas)


def _exists(replica: _Replica) -> bool:
    return replica.held or replica.order is not None or replica.failures > 0


def _replica(replica: _Replica) -> Replica:
    if replica.order is not None:
        status = ReplicaStatus.LOADING if isinstance(replica.order, Load) else ReplicaStatus.DROPPING
        until = replica.order.deadline
    elif replica.doubt:
        status = ReplicaStatus.CONDEMNED if replica.is_condemned else ReplicaStatus.QUARANTINED
        return Replica(status=status, since=replica.since, cause=replica.doubt)
    elif replica.held:
        return Replica(status=ReplicaStatus.READY, since=replica.since)
    else:
        status, until = ReplicaStatus.FAILED, replica.retry_at
    return Replica(status=status, since=replica.since, until=until, failures=replica.failures, cause=replica.cause)
