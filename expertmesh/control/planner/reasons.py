"""Say why replicas were added and retired, in figures: lines for the decision log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expertmesh.control.planner.draft import Draft, LayerTimes, Layout
from expertmesh.control.planner.values import Change
from expertmesh.ids import ExpertId

if TYPE_CHECKING:
    from collections.abc import Iterator


def changes(draft: Draft, before: list[Layout]) -> tuple[Change, ...]:
    """One for each replica that is there now and was not, or the reverse."""
    ids = draft.fleet.ids
    found: list[Change] = []
    for layer, (old, new) in enumerate(zip(before, draft.layers, strict=True)):
        if not any(old):
            why = f"first placement of layer {layer}{_time(draft, layer, old)}"
            found += [
                Change(expert=ExpertId(layer, index), host=host, what="add", why=why)
                for index, hosts in enumerate(new)
                for host in sorted([ids[host] for host in hosts])
            ]
        elif old != new:
            found += _of_layer(draft, layer, old, new)
    return tuple(found)


def _time(draft: Draft, layer: int, old: Layout) -> str:
    """What the layer's slowest host takes now, and what it would have taken."""
    ideal = draft.fleet.ideal(draft.loads[layer])
    if not ideal:
        return ""
    now = f"{draft.times(layer).slowest() / ideal:.2f} times the ideal"
    if not all(old):
        return f": its slowest host takes {now}"
    before = LayerTimes(draft.fleet, draft.loads[layer], old).settle()
    return f": the layer's slowest host goes from {before / ideal:.2f} to {now}"


def _of_layer(draft: Draft, layer: int, old: Layout, new: Layout) -> Iterator[Change]:
    ids = draft.fleet.ids
    total = sum(draft.loads[layer]) or 1.0
    time = _time(draft, layer, old)
    for index, (was, now) in enumerate(zip(old, new, strict=True)):
        if was == now:
            continue
        carries = f"{draft.loads[layer][index] / total:.1%} of the layer's load"
        if len(was) < draft.min_replicas:
            why = f"{carries}, {len(was)} of at least {draft.min_replicas} replicas{time}"
        elif len(now) == len(was):
            why = f"{carries}, moves from {' and '.join(ids[host] for host in was if host not in now)}{time}"
        else:
            why = f"{carries}, from {len(was)} to {len(now)} replicas{time}"
        for host in sorted({*was} ^ {*now}, key=ids.__getitem__):
            yield Change(
                expert=ExpertId(layer, index), host=ids[host], what="retire" if host in was else "add", why=why
            )
