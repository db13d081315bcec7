"""The hosts as the planner works with them: numbered, with the slots that a plan may use, and their failure domains."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from expertmesh.control.planner.values import HostSupply, PlanOptions, Survives
    from expertmesh.ids import HostId

Domains = tuple[int, ...]
"""Per host, the number of the failure domain that it is in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Hosts are numbered by cost, then id: ties go to the cheaper, and the inventory's order does not matter."""

    ids: tuple[HostId, ...]
    slots: tuple[int, ...]
    """What a plan may fill: without landing slots, and none on hosts of rate 0 where the others suffice."""
    rate: tuple[float, ...]
    cost: tuple[float, ...]
    domains: tuple[Domains, ...]
    """By what replicas are kept apart, widest first: racks (where known), nodes."""
    is_all_working: bool
    """Whether no host has rate 0."""
    span: int | None
    """Which of `domains` the replicas of every expert must span: the widest that has room; None when none has, or
    when one replica is enough."""

    @property
    def num_working(self) -> int:
        """Hosts that a plan may use and that do any work; at least 1, for averages."""
        return max(1, sum(n > 0 and rate > 0 for n, rate in zip(self.slots, self.rate, strict=True)))

    def ideal(self, loads: Iterable[float]) -> float:
        """The time that a layer takes if all hosts that may hold something share it by their rates."""
        speed = sum(rate for n, rate in zip(self.slots, self.rate, strict=True) if n > 0)
        return sum(loads) / (speed or sum(self.rate))

    def spans(self, hosts: Iterable[int]) -> bool:
        """Whether replicas on these hosts survive any one failure as far as this fleet can provide for it."""
        return self.span is None or len({self.domains[self.span][host] for host in hosts}) > 1

    def shared_domains(self, host: int, beside: Sequence[int]) -> tuple[bool, ...]:
        """Per kind of domain, widest first, whether `host` shares its own with one of `beside`: less is better."""
        return tuple(any(of[host] == of[other] for other in beside) for of in self.domains)


def fleet_for(inventory: Sequence[HostSupply], num_experts: int, options: PlanOptions) -> Fleet:
    """Number the hosts and settle what may be used. Raises ConfigError when the pools are too small, or senseless."""
    _check(inventory, options)
    hosts = sorted(inventory, key=lambda supply: (supply.cost, supply.host))
    replicas = options.min_replicas
    slots = [supply.slots for supply in hosts]
    _check_room(slots, num_experts, replicas)
    working = [supply.slots if supply.rate > 0 else 0 for supply in hosts]
    if _holds(working, range(len(hosts)), num_experts, replicas, replicas):
        slots = working

    domains = [_numbered(supply.node or ("", supply.host) for supply in hosts)]
    if all(supply.rack for supply in hosts):
        domains.insert(0, _numbered(supply.rack for supply in hosts))
    span = None
    if replicas > 1:
        apart = (i for i, of in enumerate(domains) if _holds(slots, of, num_experts, replicas, replicas - 1))
        span = next(apart, None)
    for landing in range(min(options.landing_slots, max(slots, default=0)), -1, -1):
        usable = [max(0, n - landing) for n in slots]
        of, most = (range(len(hosts)), replicas) if span is None else (domains[span], replicas - 1)
        if _holds(usable, of, num_experts, replicas, most):
            break
    return Fleet(
        ids=tuple(supply.host for supply in hosts),
        slots=tuple(usable),
        rate=tuple(float(supply.rate) for supply in hosts),
        cost=tuple(float(supply.cost) for supply in hosts),
        domains=tuple(domains),
        is_all_working=all(supply.rate > 0 for supply in hosts),
        span=span,
    )


def _numbered(names: Iterable[object]) -> Domains:
    number: dict[object, int] = {}
    return tuple(number.setdefault(name, len(number)) for name in names)


def _holds(slots: Sequence[int], of: Sequence[int], num_experts: int, replicas: int, most: int) -> bool:
    """Whether each expert fits `replicas` times on distinct hosts, at most `most` of them in one domain.

    This is the minimum cut of the flow experts -> domains -> hosts; all experts being alike, only the cut with all of
    them on one side can be the smallest.
    """
    room: dict[int, int] = {}
    for n, domain in zip(slots, of, strict=True):
        room[domain] = room.get(domain, 0) + min(n, num_experts)
    return sum(min(n, most * num_experts) for n in room.values()) >= replicas * num_experts


def _check_room(slots: Sequence[int], num_experts: int, replicas: int) -> None:
    if replicas > len(slots) and num_experts:
        raise ConfigError(f"min_replicas is {replicas} but there are {len(slots)} hosts: lower it, or add hosts")
    have = sum(min(n, num_experts) for n in slots)
    if have < replicas * num_experts:
        raise ConfigError(
            f"the pools are too small: {num_experts} experts with {replicas} replica{'s'[: replicas > 1]} each on "
            f"distinct hosts need {replicas * num_experts} slots and {have} can be used; "
            f"{replicas * num_experts - have} slots are missing"
        )


def _check(inventory: Sequence[HostSupply], options: PlanOptions) -> None:
    """Refuse what no plan can be made from, naming the field."""
    if options.min_replicas < 1:
        raise ConfigError(f"min_replicas is {options.min_replicas}: it must be at least 1")
    if options.landing_slots < 0:
        raise ConfigError(f"landing_slots is {options.landing_slots}: it must be 0 or more")
    for name in ("min_gain", "move_cost"):
        if not (value := getattr(options, name)) >= 0 or not isfinite(value):
            raise ConfigError(f"{name} is {value}: it must be a number of 0 or more")
    seen = set()
    for supply in inventory:
        if supply.host in seen:
            raise ConfigError(f"inventory: host {supply.host} is listed twice; list it once")
        seen.add(supply.host)
        for name in ("slots", "rate", "cost"):
            value = getattr(supply, name)
            if not isfinite(value) or value < 0:
                raise ConfigError(f"inventory: {name} of host {supply.host} is {value}; it must be 0 or more")
    if inventory and not any(supply.rate > 0 for supply in inventory):
        raise ConfigError("inventory: every host has rate 0; give at least one a rate above 0")


def survives(fleet: Fleet, racks_known: bool, replicas: Iterable[Sequence[int]]) -> Survives:
    """The largest kind of domain any one of which may fail, and any smaller one too, without an expert being lost."""
    held = list(replicas)
    answer: Survives = "nothing"
    levels: list[tuple[Survives, Domains]] = [("host", tuple(range(len(fleet.ids))))]
    levels.append(("node", fleet.domains[-1]))
    if racks_known:
        levels.append(("rack", fleet.domains[0]))
    for name, of in levels:
        if not all(len({of[host] for host in hosts}) > 1 for hosts in held):
            break
        answer = name
    return answer
