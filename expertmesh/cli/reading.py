"""What the views of a mesh add up to, for people to read. Pure: takes what /mesh/... answers, by the view's name.

Its invariant: figures come from one look at the mesh, or from two that are named before and after.
"""

from __future__ import annotations

from typing import Any

Views = dict[str, Any]
"""One look: what each of the views /mesh/... answered."""

LEVEL = 1.1
"""A layer whose slowest host takes less than this times the ideal is level."""


def holders(placed: dict[str, Any]) -> list[list[list[str]]]:
    """Who holds each expert: holders[layer][expert], from the view /mesh/placement."""
    where: list[list[list[str]]] = [[[] for _ in range(count)] for count in placed["num_experts"]]
    for host in placed["hosts"]:
        for layer, expert in host["experts"]:
            where[layer][expert].append(host["id"])
    return where


def replica_counts(placed: dict[str, Any]) -> list[list[int]]:
    """How many replicas each expert has."""
    return [list(map(len, layer)) for layer in holders(placed)]


def summary(placed: dict[str, Any], load: dict[str, Any]) -> str:
    """One line on a placement and what it is worth."""
    num_experts, num_replicas = sum(placed["num_experts"]), sum(map(sum, replica_counts(placed)))
    rows = sum(map(sum, load["per_second"]))
    return (
        f"epoch {placed['epoch']}: {num_experts:,} experts, {num_replicas:,} replicas on {len(placed['hosts'])} hosts, "
        f"{rows:,.0f} rows/s; {imbalance_text(load['imbalance'])}"
    )


def imbalance_text(imbalance: float | None) -> str:
    """A load imbalance in words."""
    if imbalance is None:
        return "no load"
    return f"the slowest host takes {imbalance:.2f} times the ideal"


def ready(views: Views) -> list[dict[str, Any]]:
    """The hosts that are ready."""
    return [host for host in views["hosts"] if host["state"] == "ready"]


def is_calm(views: Views) -> bool:
    """Whether nothing is under way and every layer's load is level."""
    ratios = [ratio for ratio in views["load"]["imbalance_of_layers"] if ratio is not None]
    return not views["moves"]["moves"] and max(ratios, default=1.0) < LEVEL


def share(views: Views, expert: tuple[int, int]) -> float:
    """An expert's part of its layer's load."""
    loads: list[float] = views["load"]["per_second"][expert[0]]
    return loads[expert[1]] / (sum(loads) or 1.0)


def gained_and_lost(before: Views, after: Views) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The experts, as (layer, index), with more replicas than before and with fewer; whose load changed most first."""
    was, now = replica_counts(before["placement"]), replica_counts(after["placement"])
    experts = [(layer, index) for layer, of in enumerate(now) for index in range(len(of))]
    experts.sort(key=lambda expert: -abs(share(after, expert) - share(before, expert)))
    gained = [(layer, index) for layer, index in experts if now[layer][index] > was[layer][index]]
    return gained, [(layer, index) for layer, index in experts if now[layer][index] < was[layer][index]]


def imbalance_if_unchanged(before: Views, after: Views) -> list[float | None]:
    """Per layer, what the placement of before would be worth under the load, and on the hosts, of after."""
    from expertmesh.control.views import imbalance
    from expertmesh.placement import Placement

    rates = {host["id"]: host["rate"] or 1.0 for host in after["hosts"]}
    return imbalance(Placement.from_json(before["placement"]), after["load"]["per_second"], rates)


def only_replicas(placed: dict[str, Any]) -> dict[str, int]:
    """Of each host, how many experts nobody else holds."""
    alone = [hosts[0] for layer in holders(placed) for hosts in layer if len(hosts) == 1]
    return {host["id"]: alone.count(host["id"]) for host in placed["hosts"]}
