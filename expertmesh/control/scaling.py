"""How many hosts each pool should have: by how busy they are, or as somebody asked. Pure.

Owns the number of hosts wanted per pool, and for how long which pool has been too busy or idle. Knows neither where
hosts run nor what they hold. Its invariant: no host is drained unless the others can hold every expert often enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING

from expertmesh.control.capacity import missing_slots
from expertmesh.control.note import Size
from expertmesh.control.state import HostStatus
from expertmesh.errors import BusyError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from expertmesh.ids import HostId


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPolicy:
    """How large one pool may be and when it changes. Raises ConfigError when that cannot be."""

    pool: str
    min_hosts: int
    """0: the pool may be empty while others hold every expert."""
    max_hosts: int
    target: float = 0.6
    """The share of time that hosts should compute."""
    band: float = 0.1
    """A host leaves only if the others stay this far below the target, so that none comes back at once."""
    up_after_s: float = 30.0
    down_after_s: float = 300.0
    cooldown_s: float = 60.0
    """Between two steps: the first must show its effect."""
    smoothing_s: float = 15.0
    """Time constant of the mean over time."""
    step_timeout_s: float = 600.0
    """A start or drain that takes longer no longer keeps others from asking for something else."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_hosts <= self.max_hosts:
            raise ConfigError(
                f"pool {self.pool}: min is {self.min_hosts} and max {self.max_hosts}; it must be 0 <= min <= max"
            )
        if not 0 < self.band < self.target <= 1:
            raise ConfigError(
                f"pool {self.pool}: target is {self.target:g} and band {self.band:g}; it must be 0 < band < target <= 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolHost:
    """One host, as scaling sees it."""

    host: HostId
    status: HostStatus
    slots: tuple[int, ...] = ()
    """Per shape; empty until known."""
    replicas: int = 0
    busy: float = 0.0
    """Share of the time since the last look that it computed."""
    rate: float = 1.0
    """What it can do, set against other hosts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartHost:
    """One more host of a pool."""

    pool: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainHost:
    """One host less: empty it, then stop it."""

    pool: str
    host: HostId
    why: str


Step = StartHost | DrainHost


@dataclass(slots=True)
class _Pool:
    """What is remembered of a pool."""

    policy: PoolPolicy
    wanted: int | None = None
    """How many hosts; None before the first look."""
    manual: bool = False
    busy: float | None = None
    """Smoothed; None without a host."""
    above_since: float | None = None
    below_since: float | None = None
    stepped_at: float = float("-inf")
    why: str = ""
    """Of the last change of `wanted`."""
    failures: int = 0
    retry_at: float = float("-inf")
    hosts: tuple[PoolHost, ...] = ()

    def with_status(self, *statuses: HostStatus) -> list[PoolHost]:
        return [host for host in self.hosts if host.status in statuses]

    @property
    def staying(self) -> list[PoolHost]:
        """The hosts that are there or come, and are not on their way out."""
        return self.with_status(HostStatus.STARTING, HostStatus.READY, HostStatus.UNREACHABLE)

    @property
    def leaving(self) -> list[PoolHost]:
        return self.with_status(HostStatus.DRAINING, HostStatus.STOPPING)

    @property
    def ready(self) -> list[PoolHost]:
        return self.with_status(HostStatus.READY)

    def want(self, hosts: int, why: str, now: float) -> None:
        self.wanted, self.why, self.stepped_at = hosts, why, now
        self.above_since = self.below_since = None


class Scaler:
    """Decides step by step. A pool that somebody scaled stays as it is until it is given back with `auto`."""

    def __init__(self, policies: Sequence[PoolPolicy], num_experts: Sequence[int], min_replicas: int) -> None:
        """`num_experts`: per shape, how many the model has; each is to be held `min_replicas` times."""
        self._pools = {policy.pool: _Pool(policy) for policy in policies}
        self._num_experts = tuple(num_experts)
        self._min_replicas = min_replicas
        self._looked_at: float | None = None

    def decide(self, hosts: Mapping[str, Sequence[PoolHost]], now: float) -> list[Step]:
        """The steps to begin now, given every pool's hosts. To be called every second or so, each time with all."""
        for name, pool in self._pools.items():
            pool.hosts = tuple(sorted(hosts.get(name, ()), key=lambda host: host.host))
            self._smooth(pool, now)
            if pool.wanted is None:
                pool.wanted = min(max(len(pool.staying), pool.policy.min_hosts), pool.policy.max_hosts)
                pool.why = f"at least {pool.policy.min_hosts} are wanted"
        self._looked_at = now
        for pool in self._pools.values():
            if not pool.manual:
                self._adjust(pool, now)
        self._hold_every_expert(now)
        return [step for pool in self._pools.values() for step in self._steps(pool, now)]

    def _smooth(self, pool: _Pool, now: float) -> None:
        rate = sum(host.rate for host in pool.ready)
        if not rate:
            pool.busy = None
            return
        busy = sum(min(1.0, max(0.0, host.busy)) * host.rate for host in pool.ready) / rate
        if pool.busy is None or self._looked_at is None:
            pool.busy = busy
        else:
            pool.busy += (busy - pool.busy) * (1 - exp(-(now - self._looked_at) / pool.policy.smoothing_s))

    # --- how many are wanted -----------------------------------------------------------------------------------------

    def _adjust(self, pool: _Pool, now: float) -> None:
        """One more host, or one fewer, if the pool has been too busy or idle for long enough."""
        policy, wanted = pool.policy, pool.wanted
        assert wanted is not None
        is_too_busy = pool.busy is not None and self._busy_when_started(pool) > policy.target
        pool.above_since = (pool.above_since if pool.above_since is not None else now) if is_too_busy else None
        busy_without = self._busy_without_one(pool)
        is_idle = busy_without is not None and busy_without < policy.target - policy.band
        pool.below_since = (pool.below_since if pool.below_since is not None else now) if is_idle else None
        if now - pool.stepped_at < policy.cooldown_s:
            return
        if pool.above_since is not None and now - pool.above_since >= policy.up_after_s:
            why = (
                f"{policy.pool} was {pool.busy:.0%} busy, above its target of {policy.target:.0%}, "
                f"for {now - pool.above_since:.0f} s"
            )
            growing = pool if wanted < policy.max_hosts else self._asleep(now)
            if growing is not None and growing.wanted is not None:
                growing.want(growing.wanted + 1, why, now)
                pool.stepped_at, pool.above_since = now, None
        elif pool.below_since is not None and now - pool.below_since >= policy.down_after_s:
            why = (
                f"{policy.pool} was {pool.busy:.0%} busy, and would be {busy_without:.0%} with one host less, below "
                f"its target of {policy.target:.0%}, for {now - pool.below_since:.0f} s"
            )
            if wanted > policy.min_hosts and self._can_leave(_emptiest(pool)):
                pool.want(wanted - 1, why, now)

    def _busy_when_started(self, pool: _Pool) -> float:
        """How busy the pool will be once the hosts that are starting take their part."""
        assert pool.busy is not None
        return pool.busy * len(pool.ready) / (len(pool.ready) + len(pool.with_status(HostStatus.STARTING)))

    def _busy_without_one(self, pool: _Pool) -> float | None:
        """How busy those would be that take over a host's work: its pool or, of a last host, all other pools.

        None: there is nobody to take it over, or the pool is just changing.
        """
        if pool.busy is None or len(pool.ready) != len(pool.hosts):
            return None
        work = pool.busy * sum(host.rate for host in pool.ready)
        rate = sum(host.rate for host in pool.ready if host.host != _emptiest(pool).host)
        if len(pool.ready) == 1:
            others = [other for other in self._pools.values() if other is not pool and other.busy is not None]
            work += sum(other.busy * sum(host.rate for host in other.ready) for other in others if other.busy)
            rate = sum(host.rate for other in others for host in other.ready)
        return work / rate if rate else None

    def _asleep(self, now: float) -> _Pool | None:
        """An empty pool that may help one that is full."""
        for pool in self._pools.values():
            is_free = not pool.manual and now - pool.stepped_at >= pool.policy.cooldown_s
            if is_free and pool.wanted == 0 and pool.policy.max_hosts > 0:
                return pool
        return None

    def _hold_every_expert(self, now: float) -> None:
        """More hosts than any pool's minimum, where these have too few slots for the model."""
        staying = [host for pool in self._pools.values() for host in pool.staying]
        is_coming = any(not host.slots for host in staying) or any(
            len(pool.staying) < (pool.wanted or 0) for pool in self._pools.values()
        )
        lacking = sum(
            missing_slots([host.slots for host in staying if host.slots], self._num_experts, self._min_replicas)
        )
        if is_coming or not lacking:
            return
        for pool in self._pools.values():
            if pool.wanted is not None and pool.wanted < pool.policy.max_hosts and not pool.manual:
                pool.want(pool.wanted + 1, f"{lacking} slots are lacking to hold every expert", now)
                return

    # --- what to do about it -----------------------------------------------------------------------------------------

    def _steps(self, pool: _Pool, now: float) -> Iterable[Step]:
        """Start what is missing; drain what is too much, one after the other."""
        name, wanted, there = pool.policy.pool, pool.wanted or 0, len(pool.staying)
        if there < wanted and now >= pool.retry_at:
            why = f"pool {name} has {there} hosts of {wanted}: {pool.why}"
            return [StartHost(pool=name, why=why)] * (wanted - there)
        if there > wanted and not pool.leaving:
            host = _emptiest(pool)
            if self._can_leave(host):
                why = (
                    f"pool {name} has {there} hosts of {wanted}: {pool.why}; {host.host} holds {host.replicas} replicas"
                )
                return [DrainHost(pool=name, host=host.host, why=why)]
        return []

    def _can_leave(self, leaving: PoolHost) -> bool:
        """Whether the ready hosts but one can hold every expert often enough."""
        others = [host for pool in self._pools.values() for host in pool.ready if host.host != leaving.host]
        return not any(missing_slots([host.slots for host in others], self._num_experts, self._min_replicas))

    # --- what people ask for -----------------------------------------------------------------------------------------

    def scale(self, name: str, hosts: int, now: float) -> None:
        """Have a pool keep this many hosts, until `auto`. Raises ConfigError, in one line, when that cannot be.

        BusyError: not before what was asked for last is done.
        """
        pool = self._known(name)
        policy = pool.policy
        if not policy.min_hosts <= hosts <= policy.max_hosts:
            raise ConfigError(
                f"pool {name} cannot have {hosts} hosts: it may have {policy.min_hosts} to {policy.max_hosts}; "
                "change min or max in the config"
            )
        is_changing = pool.leaving or len(pool.staying) != pool.wanted or pool.with_status(HostStatus.STARTING)
        if is_changing and now - pool.stepped_at < policy.step_timeout_s:
            raise BusyError(
                f"pool {name} is just being scaled to {pool.wanted} hosts and has {len(pool.hosts)}: ask again when "
                "that is done"
            )
        fewer = max(0, len(pool.ready) - hosts)
        kept = sorted(pool.ready, key=_fullness)[fewer:]
        others = [host for other in self._pools.values() if other is not pool for host in other.ready]
        lacking = sum(missing_slots([host.slots for host in (*kept, *others)], self._num_experts, self._min_replicas))
        if fewer and lacking:
            raise ConfigError(
                f"pool {name} cannot have {hosts} hosts: {lacking} slots would be lacking to hold every expert "
                f"{self._min_replicas} times; keep more of them, or scale another pool up first"
            )
        pool.manual = True
        pool.want(hosts, f"{hosts} were asked for", now)

    def auto(self, name: str) -> None:
        """Have a pool follow its load again. Raises ConfigError."""
        self._known(name).manual = False

    def sizes(self) -> dict[str, Size]:
        """How many hosts every pool is to have, as far as that is known."""
        return {
            name: Size(hosts=pool.wanted, is_manual=pool.manual)
            for name, pool in self._pools.items()
            if pool.wanted is not None
        }

    def recall(self, sizes: Mapping[str, Size]) -> None:
        """What a scaler before this one had decided, as far as the pools' limits still allow it."""
        for name, size in sizes.items():
            if (pool := self._pools.get(name)) is not None:
                pool.wanted = min(max(size.hosts, pool.policy.min_hosts), pool.policy.max_hosts)
                pool.manual = size.is_manual
                pool.why = "so many were wanted before the controller was replaced"

    def start_failed(self, name: str, now: float) -> None:
        """A host of a pool could not be started: wait before the next attempt, each time longer."""
        pool = self._known(name)
        pool.retry_at = now + min(5.0 * 2.0 ** min(pool.failures, 20), 300.0)
        pool.failures += 1

    def start_succeeded(self, name: str) -> None:
        """A host of a pool has started."""
        self._known(name).failures = 0

    def _known(self, name: str) -> _Pool:
        if name not in self._pools:
            raise ConfigError(f"pool {name!r}: there is none; pools are {', '.join(self._pools)}")
        return self._pools[name]


def _fullness(host: PoolHost) -> tuple[bool, int, HostId]:
    """Emptiest first: those that are not even ready, then by replicas."""
    return host.status is HostStatus.READY, host.replicas, host.host


def _emptiest(pool: _Pool) -> PoolHost:
    return min(pool.staying, key=_fullness)
