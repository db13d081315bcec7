"""Around hosts that cannot have an expert just now, such as where its file is damaged. Pure.

The planner knows hosts by their room and speed only. Its invariant: what comes out fits into the slots if what went in
did, and every expert has as many replicas as before.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from expertmesh.ids import ExpertId, HostId

    Replicas = Mapping[ExpertId, tuple[HostId, ...]]
    Banned = Collection[tuple[ExpertId, HostId]]


def around(replicas: Replicas, banned: Banned, slots: Mapping[HostId, int]) -> Replicas:
    """The same placement, but for the banned replicas: each goes to another host, if there is one.

    One with a free slot, or else one that can trade a replica for it. `slots`: by host, of this shape of experts.
    """
    result = {expert: list(hosts) for expert, hosts in replicas.items()}
    count = Counter(host for hosts in result.values() for host in hosts)
    for expert, host in sorted(banned):
        if host not in result.get(expert, ()):
            continue
        others = [other for other in sorted(slots) if other not in result[expert] and (expert, other) not in banned]
        others.sort(key=lambda other: count[other] - slots[other])
        if others and count[others[0]] < slots[others[0]]:
            _move(result[expert], host, others[0])
            count[host] -= 1
            count[others[0]] += 1
        elif (trade := _trade(result, others, host, banned)) is not None:
            given, other = trade
            _move(result[expert], host, other)
            _move(result[given], other, host)
    return {expert: tuple(sorted(hosts)) for expert, hosts in result.items()}


def _trade(
    result: Mapping[ExpertId, list[HostId]], others: list[HostId], host: HostId, banned: Banned
) -> tuple[ExpertId, HostId] | None:
    """An expert that `host` may have, and who of the others gives it away."""
    for other in others:
        for given, hosts in result.items():
            if other in hosts and host not in hosts and (given, host) not in banned:
                return given, other
    return None


def _move(hosts: list[HostId], old: HostId, new: HostId) -> None:
    hosts[hosts.index(old)] = new
