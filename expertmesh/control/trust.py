"""What is known of replicas' digests, and whose word counts when a router doubts one. Pure.

Owns the digests, the doubts of the last minutes and what came of them. Its invariant: neither a router that doubts
everything nor a host whose doubted replicas pass every test can cost an expert its last replica for longer than a test
takes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from expertmesh.hosts.digest import ReplicaDigest
    from expertmesh.ids import ExpertId, HostId

MEMORY_S = 600.0
"""Doubts that are older count no more."""
VOTES = 3
"""Hosts that are remembered to have read an expert's weights alike; more would say nothing new."""
STRIKES = 3
"""So many doubts within `MEMORY_S`, and a host is not to be trusted."""
STRIKE_EVERY_S = 1.0
"""Doubts that come together are one: one broken launch shows in many replicas."""
FRESH_S = 5.0
"""A replica that was tested so recently is not doubted for it if it is the last."""
NONSENSE_PER_HOST = 3
"""A router of which so many unfounded doubts came, per host of the mesh, and over most hosts, is itself in doubt."""


class _Unfounded(NamedTuple):
    """A doubt about a replica that turned out to compute as it should."""

    at: float
    router: str
    host: HostId


class Trust:
    """Remembers of every replica what its load gave, and of every host how often it was doubted."""

    def __init__(self) -> None:
        self._votes: dict[ExpertId, dict[bytes, list[HostId]]] = {}
        """What was read, the first thing first, and by whom: the last few hosts."""
        self._digests: dict[tuple[ExpertId, HostId], ReplicaDigest] = {}
        self._tested_at: dict[tuple[ExpertId, HostId], float] = {}
        self._strikes: defaultdict[HostId, deque[float]] = defaultdict(deque)
        self._unfounded: deque[_Unfounded] = deque()

    # --- digests -----------------------------------------------------------------------------------------------------

    def knows(self, expert: ExpertId, host: HostId) -> bool:
        """Whether there is something to hold a replica's answer against."""
        return (expert, host) in self._digests

    def learn(self, expert: ExpertId, host: HostId, digest: ReplicaDigest, now: float) -> list[HostId]:
        """Note what a replica is. Returns the hosts, maybe this one, that read other weights than most did.

        Of two hosts that differ, the first is taken to be right until there is a third.
        """
        self._digests[expert, host] = digest
        self._tested_at[expert, host] = now
        if not digest.weights:
            return []
        votes = self._votes.setdefault(expert, {})
        for hosts in votes.values():
            if host in hosts:
                hosts.remove(host)
        votes.setdefault(digest.weights, []).append(host)
        del votes[digest.weights][:-VOTES]
        right = max(votes, key=lambda weights: len(votes[weights]))
        return [wrong for weights, hosts in votes.items() if weights != right for wrong in hosts]

    def passes(self, expert: ExpertId, host: HostId, digest: ReplicaDigest, now: float) -> bool:
        """Whether a replica still is what it was."""
        if self._digests.get((expert, host)) != digest:
            return False
        self._tested_at[expert, host] = now
        return True

    def forget(self, expert: ExpertId, host: HostId) -> None:
        """The replica is no more, or is not to be relied on."""
        self._digests.pop((expert, host), None)
        self._tested_at.pop((expert, host), None)

    @property
    def hosts(self) -> set[HostId]:
        """Those of which anything is known."""
        return {host for _, host in self._digests} | self._strikes.keys()

    def forget_host(self, host: HostId) -> None:
        """The host has ended."""
        for expert, of in [key for key in self._digests if key[1] == host]:
            self.forget(expert, of)
        self._strikes.pop(host, None)

    # --- doubts ------------------------------------------------------------------------------------------------------

    def is_fresh(self, expert: ExpertId, host: HostId, now: float) -> bool:
        """Whether the replica has passed a test a moment ago."""
        return now - self._tested_at.get((expert, host), float("-inf")) < FRESH_S

    def believes(self, router: str, num_hosts: int, now: float) -> bool:
        """Whether a router's doubt alone is enough to stop using a replica."""
        while self._unfounded and now - self._unfounded[0].at > MEMORY_S:
            self._unfounded.popleft()
        about = [doubt.host for doubt in self._unfounded if doubt.router == router]
        is_over_most = len(set(about)) > max(1, num_hosts / 2)
        return not (is_over_most and len(about) >= NONSENSE_PER_HOST * num_hosts)

    def unfounded(self, router: str, host: HostId, now: float) -> None:
        """A doubted replica has passed the test."""
        self._unfounded.append(_Unfounded(now, router, host))

    def strike(self, host: HostId, now: float) -> bool:
        """A replica of the host was doubted: whether that was once too often. It starts anew then."""
        strikes = self._strikes[host]
        while strikes and now - strikes[0] > MEMORY_S:
            strikes.popleft()
        if not strikes or now - strikes[-1] >= STRIKE_EVERY_S:
            strikes.append(now)
        if len(strikes) < STRIKES:
            return False
        strikes.clear()
        return True
