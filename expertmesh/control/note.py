"""What a controller leaves for the one that follows it. JSON, so that any version can look at it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from expertmesh.errors import ConfigError
from expertmesh.ids import ExpertId, HostId

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How many hosts a pool is to have."""

    hosts: int
    is_manual: bool
    """Because somebody asked for it: the load changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What cannot be learned from hosts."""

    named: Mapping[str, int] = field(default_factory=dict)
    """Per pool, how many hosts were ever named: a name is not used twice."""
    sizes: Mapping[str, Size] = field(default_factory=dict)
    """Per pool."""
    standby: frozenset[HostId] = frozenset()
    """The hosts that are not needed yet."""
    doubted: frozenset[tuple[ExpertId, HostId]] = frozenset()
    """The replicas that are not to be used until they were verified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """The last placement, and the rest."""

    epoch: int
    replicas: Mapping[ExpertId, tuple[HostId, ...]]
    memory: Memory

    def to_bytes(self) -> bytes:
        replicas = [[expert.layer, expert.index, list(hosts)] for expert, hosts in sorted(self.replicas.items())]
        memory = self.memory
        value = {
            "epoch": self.epoch,
            "replicas": replicas,
            "named": memory.named,
            "sizes": {pool: [size.hosts, size.is_manual] for pool, size in memory.sizes.items()},
            "standby": sorted(memory.standby),
            "doubted": [[expert.layer, expert.index, host] for expert, host in sorted(memory.doubted)],
        }
        return json.dumps(value).encode()

    @staticmethod
    def from_bytes(data: bytes | None) -> Note | None:
        """None when there is no note. Raises ConfigError for one that cannot be read."""
        if not data:
            return None
        try:
            return _read(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"what the controller before this one left cannot be read ({type(error).__name__}): take the mesh down "
                "and deploy it anew"
            ) from error


def _read(value: dict[str, Any]) -> Note:
    """Raises one of several errors for anything that `to_bytes` cannot have made."""
    sizes = value.get("sizes", {})
    memory = Memory(
        named={_text(pool): _count(number) for pool, number in value["named"].items()},
        sizes={
            _text(pool): Size(hosts=_count(hosts), is_manual=bool(manual)) for pool, (hosts, manual) in sizes.items()
        },
        standby=frozenset(_host(host) for host in value.get("standby", ())),
        doubted=frozenset((_expert(layer, index), _host(host)) for layer, index, host in value.get("doubted", ())),
    )
    replicas = {
        _expert(layer, index): tuple(_host(host) for host in hosts) for layer, index, hosts in value["replicas"]
    }
    return Note(epoch=_count(value["epoch"]), replicas=replicas, memory=memory)


def _expert(layer: object, index: object) -> ExpertId:
    return ExpertId(_count(layer), _count(index))


def _host(value: object) -> HostId:
    return HostId(_text(value))


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError("a count is none")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a name is none")
    return value
