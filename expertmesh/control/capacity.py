"""Whether hosts have slots enough for the model, before any of them is taken away. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expertmesh.control.state import HostStatus
from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertmesh.control.state import Observed
    from expertmesh.ids import HostId


def missing_slots(hosts: Sequence[tuple[int, ...]], num_experts: Sequence[int], min_replicas: int) -> tuple[int, ...]:
    """Per shape, how many slots are lacking to hold every expert `min_replicas` times on distinct hosts; 0: enough.

    An expert is on a host once at most, so slots beyond the number of experts do not count. That this is enough, and
    not only needed, follows from Gale and Ryser: what k experts can use, sum(min(slots, k)), is concave in k.
    """
    return tuple(
        max(0, total * min_replicas - sum(min(slots[shape], total) for slots in hosts))
        for shape, total in enumerate(num_experts)
    )


def check_drain(host: HostId, observed: Observed, num_experts: Sequence[int], min_replicas: int) -> None:
    """Whether a host can be drained. Raises ConfigError: there is no such host, or the others cannot hold everything.

    `num_experts`: per shape, how many the model has.
    """
    if host not in observed.hosts:
        raise ConfigError(f"host {host!r}: there is none; hosts are {', '.join(sorted(observed.hosts))}")
    others = [other.slots for other in observed.hosts.values() if other.id != host and other.status is HostStatus.READY]
    for shape, need in enumerate(missing_slots(others, num_experts, min_replicas)):
        if need > 0:
            raise ConfigError(
                f"host {host!r} cannot be drained: the {len(others)} other ready hosts lack {need} slots to hold "
                f"{num_experts[shape]} experts {min_replicas} times; add a host first"
            )
