"""What happens when a replica is doubted: it is used no more, tested, and then used again or loaded anew.

Carries out what `trust` weighs, and sees to it that every replica's digest is known. Its invariant: a replica in
quarantine is tested until the test has an outcome or its host has ended.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from expertmesh.control.state import ReplicaStatus
from expertmesh.control.trust import STRIKES, Trust
from expertmesh.errors import ExpertMeshError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from expertmesh.clock import Clock
    from expertmesh.control.growth import Growth
    from expertmesh.control.journal import Journal
    from expertmesh.control.ledger import Ledger
    from expertmesh.control.members import Members
    from expertmesh.control.state import Observed
    from expertmesh.control.tasks import Tasks
    from expertmesh.doubt import Doubt
    from expertmesh.hosts.digest import ReplicaDigest
    from expertmesh.ids import ExpertId, HostId

TEST_TIMEOUT_S = 10.0
PAUSE_S = 1.0
"""Before a test that got no answer is tried again."""


class Doubts:
    """The quarantine of one mesh."""

    def __init__(
        self,
        members: Members,
        growth: Growth,
        ledger: Ledger,
        journal: Journal,
        tasks: Tasks,
        clock: Clock,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when other replicas count than before."""
        self._members = members
        self._growth = growth
        self._ledger = ledger
        self._journal = journal
        self._tasks = tasks
        self._clock = clock
        self._changed = changed
        self._trust = Trust()
        self._raised_by: dict[tuple[ExpertId, HostId], str] = {}
        """By replica that is to be tested, the router that doubts it."""
        self._pauses: dict[HostId, float] = {}
        """Until when a host is not asked: the last test there got no answer."""
        self._busy: set[HostId] = set()
        """Those that are being tested."""
        self._distrusted: set[HostId] = set()

    # --- what is heard -----------------------------------------------------------------------------------------------

    def suspect(self, router: str, doubts: Iterable[Doubt]) -> None:
        """A router doubts replicas. What it says of those that are not in use changes nothing."""
        now = self._clock.monotonic()
        observed = self._ledger.observed(now)
        ready = _ready(observed)
        is_believed = self._trust.believes(router, len(observed.hosts), now)
        doubted = {(doubt.expert, doubt.host): doubt.cause for doubt in doubts}
        times = Counter(expert for expert, _ in doubted)
        struck = set()
        for (expert, host), cause in doubted.items():
            hosts = ready.get(expert, set())
            if host not in hosts or (len(hosts) == 1 and self._trust.is_fresh(expert, host, now)):
                continue
            self._raised_by[expert, host] = router
            what = f"{expert} on {host}: {cause}, says {router}"
            if is_believed and self._ledger.doubted(host, expert, cause, now):
                hosts.discard(host)
                if times[expert] == 1:  # of two that differ, the test says which is wrong
                    struck.add(host)
                self._journal.add("quarantine", f"{what}; it is used again when it was tested", host=host)
            else:
                self._journal.add("doubt", f"{what}; of its doubts, too many were unfounded", host=host)
        for host in sorted(struck):
            self._strike(host)
        self._changed()

    def loaded(self, expert: ExpertId, host: HostId, digest: ReplicaDigest) -> None:
        """A host has loaded a replica, and this is what it is. Who read other weights than most has to drop it."""
        for wrong in self._trust.learn(expert, host, digest, self._clock.monotonic()):
            others = f"{host} did" if wrong != host else "other hosts did"
            self._condemn(expert, wrong, f"{wrong} read other weights than {others}")

    def dropped(self, expert: ExpertId, host: HostId) -> None:
        """A replica is no more."""
        self._trust.forget(expert, host)

    # --- what is done ------------------------------------------------------------------------------------------------

    def turn(self, observed: Observed) -> None:
        """Test what is in quarantine or in doubt, and learn what is not known yet: on each host one by one."""
        now = self._clock.monotonic()
        for host in self._trust.hosts - observed.hosts.keys():
            self._trust.forget_host(host)
        self._distrusted &= observed.hosts.keys()
        self._raised_by = {key: router for key, router in self._raised_by.items() if key[1] in observed.hosts}
        for state in observed.hosts.values():
            if not state.is_serving or state.id in self._busy or self._pauses.get(state.id, now) > now:
                continue
            doubted, unknown = [], []
            for expert, replica in state.replicas.items():
                if replica.status is ReplicaStatus.QUARANTINED:
                    doubted.append(expert)
                elif replica.status is ReplicaStatus.READY:
                    if (expert, state.id) in self._raised_by:
                        doubted.append(expert)
                    elif not self._trust.knows(expert, state.id):
                        unknown.append(expert)
            if doubted or unknown:
                self._busy.add(state.id)
                self._tasks.start(self._test(state.id, doubted or unknown))

    async def _test(self, host: HostId, experts: list[ExpertId]) -> None:
        try:
            for expert in experts:
                if host not in self._members:
                    return
                async with asyncio.timeout(TEST_TIMEOUT_S):
                    digest = await self._members[host].control.verify(expert)
                self._judge(expert, host, digest)
        except (ExpertMeshError, TimeoutError):  # it may be gone, or be there again in a while
            self._pauses[host] = self._clock.monotonic() + PAUSE_S
        finally:
            self._busy.discard(host)

    def _judge(self, expert: ExpertId, host: HostId, digest: ReplicaDigest) -> None:
        now = self._clock.monotonic()
        router = self._raised_by.pop((expert, host), None)
        if not self._trust.knows(expert, host):
            self.loaded(expert, host, digest)
            self._ledger.cleared(host, expert, now)
        elif self._trust.passes(expert, host, digest, now):
            self._ledger.cleared(host, expert, now)
            if router is not None:
                self._trust.unfounded(router, host, now)
                self._journal.add("readmit", f"{expert} on {host}: it computes what it did when loaded", host=host)
        else:
            self._condemn(expert, host, f"{host} computes otherwise than when it was loaded")
            self._strike(host)
        self._changed()

    def _condemn(self, expert: ExpertId, host: HostId, cause: str) -> None:
        self._trust.forget(expert, host)
        if self._ledger.condemned(host, expert, cause, self._clock.monotonic()):
            self._journal.add("condemn", f"{expert} on {host}: {cause}; it is dropped and loaded anew", host=host)
            self._changed()

    def _strike(self, host: HostId) -> None:
        """Once more, and a host is replaced; never two at once, for then the fault may be elsewhere."""
        if not self._trust.strike(host, self._clock.monotonic()) or self._distrusted:
            return
        self._distrusted.add(host)
        self._journal.add("distrust", f"{host}: doubted {STRIKES} times; it is drained and replaced", host=host)
        self._growth.drain(host)


def _ready(observed: Observed) -> dict[ExpertId, set[HostId]]:
    """By expert, the hosts whose replica answers."""
    ready: dict[ExpertId, set[HostId]] = {}
    for state in observed.hosts.values():
        if state.is_serving:
            for expert, replica in state.replicas.items():
                if replica.status is ReplicaStatus.READY:
                    ready.setdefault(expert, set()).add(state.id)
    return ready
