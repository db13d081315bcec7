"""What the findings come to, in a few sentences for the head of the page.

Invariant: a sentence states figures of the findings; whether it is a worry is decided here and nowhere else.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertmesh.inspect.findings import Findings

_UNEVEN = 0.4
"""Balancedness below which a layer is called uneven."""

_APART = 0.15
"""Distance of domains below which gates are said not to tell them apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One sentence."""

    text: str
    is_worry: bool = False


def mean_distances(findings: Findings) -> dict[tuple[str, str], float]:
    """Of each two domains, over all layers."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for layer in findings.layers:
        for distance in layer.distances:
            values[distance.domains].append(distance.value)
    return {pair: sum(each) / len(each) for pair, each in values.items()}


def summarize(findings: Findings) -> list[Point]:
    """From what one looks for first to what one looks for last."""
    points = [*_differences(findings), _dead(findings), _overloaded(findings), _twins(findings), _balance(findings)]
    if not findings.is_enough:
        points.append(
            Point(
                text="Little text was read for so many experts: take what is said of dead experts as a first hint, and "
                "read more text to be sure.",
                is_worry=True,
            )
        )
    return points


def _differences(findings: Findings) -> list[Point]:
    distances = mean_distances(findings)
    if not distances:
        return [Point(text="One kind of text was read; give a second one to see which experts tell them apart.")]
    far = max(distances, key=lambda pair: distances[pair])
    is_told = distances[far] >= _APART
    word = "Most apart are" if is_told else "All texts use much the same experts; most apart are"
    points = [
        Point(
            text=f"{word} {far[0]} and {far[1]}: on average {distances[far]:.0%} of the choices of one would have to go"
            " to other experts to match the other.",
            is_worry=not is_told,
        )
    ]
    layer = max(findings.layers, key=lambda layer: max(distance.value for distance in layer.distances))
    most = max(layer.distances, key=lambda distance: distance.value)
    points.append(
        Point(
            text=f"The gates part texts most in layer {layer.layer}: {most.value:.0%} between {most.domains[0]} and"
            f" {most.domains[1]}."
        )
    )
    return points


def _dead(findings: Findings) -> Point:
    dead = sum(len(layer.dead) for layer in findings.layers)
    nearly = sum(len(layer.nearly_dead) for layer in findings.layers)
    experts = sum(layer.num_experts for layer in findings.layers)
    if not dead + nearly:
        return Point(text=f"None of the {experts:,} experts is dead: these texts use them all.")
    return Point(
        text=f"Of {experts:,} experts {dead:,} never fired and {nearly:,} hardly ever did, for these texts.",
        is_worry=(dead + nearly) / experts > 0.05,
    )


def _overloaded(findings: Findings) -> Point:
    hot = [(layer, expert) for layer in findings.layers for expert in layer.overloaded]
    if not hot:
        return Point(text="No expert is overloaded: none gets twice an even share over all texts together.")
    layer, expert = max(hot, key=lambda one: one[0].loads[one[1]])
    verb = "expert gets" if len(hot) == 1 else "experts get"
    return Point(
        text=f"{len(hot):,} {verb} twice an even share or more; the busiest, expert {expert} of layer {layer.layer},"
        f" gets {layer.loads[expert]:.1f} times as much.",
        is_worry=True,
    )


def _twins(findings: Findings) -> Point:
    twins = sum(len(layer.twins) for layer in findings.layers)
    if not twins:
        return Point(text="No two experts of a layer are twins: each gets tokens of its own.")
    verb = "pair of experts gets" if twins == 1 else "pairs of experts get"
    return Point(text=f"{twins:,} {verb} much the same tokens.", is_worry=True)


def _balance(findings: Findings) -> Point:
    mean = sum(layer.balancedness for layer in findings.layers) / len(findings.layers)
    worst = min(findings.layers, key=lambda layer: layer.balancedness)
    return Point(
        text=f"Balancedness is {mean:.2f} on average, and lowest in layer {worst.layer} with {worst.balancedness:.2f}.",
        is_worry=worst.balancedness < _UNEVEN,
    )
