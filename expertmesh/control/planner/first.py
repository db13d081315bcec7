"""Where experts go before any load is known, and what that needs of a host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmesh.errors import ConfigError
from expertmesh.ids import ExpertId, HostId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertmesh.hosts.configuration import HostConfiguration


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What one host offers."""

    host: HostId
    slots: tuple[int, ...]
    """Per shape of experts, how many the host has room for."""


def spread(
    configuration: HostConfiguration, inventory: Sequence[Inventory], min_replicas: int
) -> dict[ExpertId, tuple[HostId, ...]]:
    """Place every expert `min_replicas` times, on distinct hosts, before any load is known.

    Each layer is dealt out evenly, because it is one layer's slowest host that a token waits for. Deterministic.
    Raises ConfigError, saying how much is missing, when the slots do not suffice.
    """
    for shape in range(len(configuration.specs)):
        need = configuration.num_experts(shape) * min_replicas
        have = sum(min(host.slots[shape], configuration.num_experts(shape)) for host in inventory)
        if have < need:
            spec = configuration.specs[shape]
            raise ConfigError(
                f"the pools are too small: {need} slots are needed ({configuration.num_experts(shape)} experts of "
                f"{spec.num_bytes:,} bytes, {min_replicas} replicas of each) and {have} are there; "
                f"{(need - have) * spec.num_bytes:,} bytes of memory are missing"
            )
    free = {host.host: list(host.slots) for host in inventory}
    replicas: dict[ExpertId, tuple[HostId, ...]] = {}
    for layer, num_experts in enumerate(configuration.layer_experts):
        shape = configuration.layer_specs[layer]
        in_layer = dict.fromkeys(free, 0)
        for index in range(num_experts):
            # Fullest last: taking the hosts with most room keeps enough distinct hosts for those that follow.
            by_room = sorted(free, key=lambda host: (-free[host][shape], in_layer[host]))
            chosen = tuple(by_room[:min_replicas])
            for host in chosen:
                if not free[host][shape]:
                    raise ConfigError(
                        f"expert {layer}:{index} finds no {min_replicas} hosts with a free slot: give the smaller "
                        "hosts more memory, or lower experts.min_replicas"
                    )
                free[host][shape] -= 1
                in_layer[host] += 1
            replicas[ExpertId(layer, index)] = chosen
    return replicas
