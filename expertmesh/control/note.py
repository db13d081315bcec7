"""What a controller leaves for the one that follows it. JSON, so that any version can look at it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmesh.ids import ExpertId, HostId

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """The last placement, and what cannot be learned from hosts."""

    epoch: int
    replicas: Mapping[ExpertId, tuple[HostId, ...]]
    named: Mapping[str, int]
    """Per pool, how many hosts were ever named: a name is not used twice."""

    def to_bytes(self) -> bytes:
        replicas = [[expert.layer, expert.index, list(hosts)] for expert, hosts in sorted(self.replicas.items())]
        value = {"epoch": self.epoch, "replicas": replicas, "named": self.named}
        return json.dumps(value).encode()

    @staticmethod
    def from_bytes(data: bytes | None) -> Note | None:
        """None when there is no note."""
        if not data:
            return None
        value = json.loads(data)
        replicas = {
            ExpertId(layer, index): tuple(HostId(host) for host in hosts) for layer, index, hosts in value["replicas"]
        }
        return Note(epoch=value["epoch"], replicas=replicas, named=value["named"])
