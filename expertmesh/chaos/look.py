"""One look at a mesh, from outside: what its views and the processes of this machine add up to. Pure.

Counts as there only what is: a host that was killed holds nothing, whatever a view still says of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What makes a mesh whole."""

    replicas: int = 1
    """Of every expert."""
    fewest_hosts: int = 0
    most_hosts: int = 1_000_000
    routers: int | None = None
    """None: nobody can tell how many there are."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is seen at one moment."""

    began_s: float
    """When it was begun: what has happened since may not show."""
    hosts: Sequence[Mapping[str, Any]] = ()
    """As /mesh/hosts has them."""
    placement: Mapping[str, Any] | None = None
    num_moves: int = 0
    routers: int | None = None
    """Those that are ready."""
    dead: frozenset[str] = frozenset()
    """Hosts whose processes have ended."""
    here: frozenset[str] = frozenset()
    """Nodes that must not be killed, for the mesh is controlled from there."""
    wanted: Wanted = Wanted()
    error: str = ""
    """Why nothing could be seen; the rest is empty then."""

    @cached_property
    def ready(self) -> list[str]:
        """Hosts that are there and take part, in order."""
        return sorted(host["id"] for host in self.hosts if host["state"] == "ready" and host["id"] not in self.dead)

    @property
    def names(self) -> set[str]:
        """All hosts that are known to the mesh."""
        return {host["id"] for host in self.hosts}

    @cached_property
    def holders(self) -> dict[tuple[int, int], list[str]]:
        """Of each expert, the hosts that are ready and hold it by the placement."""
        if self.placement is None:
            return {}
        counts = self.placement["num_experts"]
        held: dict[tuple[int, int], list[str]] = {(i, e): [] for i, count in enumerate(counts) for e in range(count)}
        for host in self.placement["hosts"]:
            if host["id"] in self.ready:
                for layer, expert in host["experts"]:
                    held[layer, expert].append(host["id"])
        return held

    @cached_property
    def sole_holders(self) -> list[str]:
        """Hosts that hold some expert's only replica, in order."""
        return sorted({hosts[0] for hosts in self.holders.values() if len(hosts) == 1})

    @cached_property
    def other_nodes(self) -> list[str]:
        """Nodes with hosts that may be killed, in order."""
        return sorted({str(host["node"]) for host in self.hosts if host["id"] in self.ready} - self.here)

    def hosts_of(self, node: str) -> tuple[str, ...]:
        """A node's hosts."""
        return tuple(sorted(host["id"] for host in self.hosts if host["node"] == node and host["id"] in self.ready))

    @property
    def is_covered(self) -> bool:
        """Whether every expert has as many replicas as it should."""
        return bool(self.holders) and all(len(hosts) >= self.wanted.replicas for hosts in self.holders.values())

    @property
    def is_whole(self) -> bool:
        """Whether, besides, nothing is missing or too much."""
        is_there = self.wanted.fewest_hosts <= len(self.ready) <= self.wanted.most_hosts
        has_routers = self.wanted.routers is None or self.routers == self.wanted.routers
        return self.is_covered and is_there and has_routers and all(host["state"] == "ready" for host in self.hosts)

    @property
    def is_moving(self) -> bool:
        """Whether replicas are loaded, or hosts come or go."""
        return self.num_moves > 0 or any(host["state"] in ("starting", "draining", "stopping") for host in self.hosts)

    def holds(self, condition: str) -> bool:
        """Whether a script's condition does."""
        if self.error:
            return False
        return {"covered": self.is_covered, "whole": self.is_whole, "moving": self.is_moving}[condition]
