"""Whom of its hosts a router trusts, from what it has seen of them. Pure: it is told the time.

A host is *trusted*, *shunned*, or *on probation*. A trusted one that twice lets its rows come so late that another host
is asked for them too, or whose link breaks, is shunned for a while: its rows go to other replicas, where there are any.
Then it is on probation: it gets copies of rows that others compute as well, until several come back in time. Each time
that it is shunned again soon, that lasts twice as long, so that it does not flap.

What is late follows from the host itself: far above what nearly all of its answers took, for requests of like size. So
slow devices are not punished for being slow, only for being slower than they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from expertmesh.ids import HostId


class Trust(StrEnum):
    """What a router makes of a host."""

    TRUSTED = "trusted"
    SHUNNED = "shunned"
    PROBATION = "probation"


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthOptions:
    """When a host loses a router's trust, and how it gets it back. Times in seconds."""

    quantile: float = 0.95
    """Of a host's answers, the share whose time is taken to be usual."""
    late_factor: float = 2.0
    """An answer is late when it takes so many times as long as is usual."""
    late_least_s: float = 0.02
    """And never before this: on a busy machine, a few milliseconds say nothing."""
    late_unknown_s: float = 1.0
    """For a host that has not answered yet."""
    misses: int = 2
    """In a row; then the host is shunned."""
    shun_first_s: float = 0.5
    shun_longest_s: float = 30.0
    forgive_s: float = 60.0
    """After so long in trust, a host's past is forgotten."""
    probe_every_s: float = 0.1
    probe_timeout_s: float = 1.0
    probes_to_pass: int = 3
    """In a row, each in time."""


_STEP = 0.1
"""How fast the estimate of a quantile follows: by this share of itself."""
_MISSED_PROBE = 1.25
"""A probe that came, but late, also teaches what is usual by now: a host that has become slower for good is accepted in
time, the sooner the less slow it is."""


@dataclass(slots=True)
class _Host:
    usual_s: dict[int, float] = field(default_factory=dict)
    """By size of request (the bit length of its pairs): the quantile of its answers' times."""
    trust: Trust = Trust.TRUSTED
    since: float = 0.0
    """TRUSTED: when it was trusted again."""
    until: float = 0.0
    """SHUNNED: when probation begins."""
    misses: int = 0
    shun_s: float = 0.0
    """How long it was shunned the last time; 0: never, or forgotten."""
    probed_at: float = float("-inf")
    passed: int = 0


class Health:
    """All hosts that one router knows. Times are seconds of one monotonic clock."""

    def __init__(self, options: HealthOptions | None = None) -> None:
        self._options = options or HealthOptions()
        self._hosts: dict[HostId, _Host] = {}
        self._avoided: frozenset[HostId] = frozenset()

    @property
    def avoided(self) -> frozenset[HostId]:
        """The hosts that are not trusted now."""
        return self._avoided

    def trust(self, host: HostId) -> Trust:
        known = self._hosts.get(host)
        return known.trust if known else Trust.TRUSTED

    def late_after_s(self, host: HostId, pairs: int) -> float:
        """After what time an answer to so many pairs is late."""
        options = self._options
        known = self._hosts.get(host)
        if known is None or not known.usual_s:
            return options.late_unknown_s
        size = pairs.bit_length()
        usual_s = known.usual_s.get(size)
        if usual_s is None:  # at worst, time grows with size
            usual_s = max(known_s * 2.0 ** max(0, size - of) for of, known_s in known.usual_s.items())
        return max(options.late_least_s, options.late_factor * usual_s)

    # --- what happens ------------------------------------------------------------------------------------------------

    def answered(self, host: HostId, pairs: int, took_s: float, now: float) -> None:
        """It answered; `took_s` from sending to receiving."""
        known = self._hosts.get(host)
        if known is None:
            known = self._hosts[host] = _Host(since=now)
        in_time = took_s <= self.late_after_s(host, pairs)
        size = pairs.bit_length()
        usual_s = known.usual_s.get(size)
        # One number instead of a window: it rises by 0.95 steps and falls by 0.05, and so stands where 95% lie below.
        if usual_s is None:
            known.usual_s[size] = 2 * took_s
        elif took_s > usual_s:
            known.usual_s[size] = usual_s * (1 + _STEP * self._options.quantile)
        else:
            known.usual_s[size] = usual_s * (1 - _STEP * (1 - self._options.quantile))
        if in_time:
            known.misses = 0
        if known.shun_s and known.trust is Trust.TRUSTED and now - known.since > self._options.forgive_s:
            known.shun_s = 0.0

    def missed(self, host: HostId, now: float) -> None:
        """Its rows were late, and another host was faster although asked later."""
        known = self._hosts.setdefault(host, _Host(since=now))
        known.misses += 1
        if known.trust is Trust.TRUSTED and known.misses >= self._options.misses:
            self._shun(host, known, now)

    def broke(self, host: HostId, now: float) -> None:
        """Its link broke, or it failed at what it was asked for."""
        known = self._hosts.setdefault(host, _Host(since=now))
        if known.trust is not Trust.SHUNNED:
            self._shun(host, known, now)

    def _shun(self, host: HostId, known: _Host, now: float) -> None:
        options = self._options
        known.shun_s = min(options.shun_longest_s, 2 * known.shun_s) if known.shun_s else options.shun_first_s
        known.trust, known.until = Trust.SHUNNED, now + known.shun_s
        known.misses = known.passed = 0
        self._avoided |= {host}

    # --- probation ---------------------------------------------------------------------------------------------------

    def to_probe(self, now: float) -> list[HostId]:
        """The hosts that should get a copy of some rows now; each is taken to get one."""
        due = []
        for host in self._avoided:
            known = self._hosts[host]
            if known.trust is Trust.SHUNNED and now >= known.until:
                known.trust = Trust.PROBATION
            if known.trust is Trust.PROBATION and now - known.probed_at >= self._options.probe_every_s:
                known.probed_at = now
                due.append(host)
        return due

    def probed(self, host: HostId, pairs: int, took_s: float | None, now: float) -> None:
        """What came of a probe; `took_s` None: no answer, within `probe_timeout_s`."""
        known = self._hosts.get(host)
        if known is None or known.trust is not Trust.PROBATION:
            return
        if took_s is None:
            self._shun(host, known, now)
        elif took_s > self.late_after_s(host, pairs):
            for size in known.usual_s:
                known.usual_s[size] *= _MISSED_PROBE
            self._shun(host, known, now)
        else:
            known.passed += 1
            if known.passed >= self._options.probes_to_pass:
                known.trust, known.since = Trust.TRUSTED, now
                self._avoided -= {host}

    @property
    def probe_timeout_s(self) -> float:
        return self._options.probe_timeout_s

    def keep_only(self, hosts: Collection[HostId]) -> None:
        """Forget all others: they are gone, and names do not come back."""
        self._hosts = {host: known for host, known in self._hosts.items() if host in hosts}
        self._avoided = frozenset(self._avoided.intersection(hosts))
