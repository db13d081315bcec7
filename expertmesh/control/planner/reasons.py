"""Say why replicas were added and retired, in figures: lines for the decision log."""

from __future__ import annotations

from expertmesh.control.planner.draft import Draft, LayerTimes, Layout
from expertmesh.control.planner.values import Change
from expertmesh.ids import ExpertId


def changes(draft: Draft, before: list[Layout], max_time: list[float]) -> tuple[Change, ...]:
    """One for each replica that is there now and was not, or the reverse."""
    found: list[Change] = []
    for layer, (old, new) in enumerate(zip(before, draft.layers, strict=True)):
        if old == new:
            continue
        total = sum(draft.loads[layer]) or 1.0
        faster = _faster(draft, layer, old, max_time[layer])
        for index, (was, now) in enumerate(zip(old, new, strict=True)):
            if was != now:
                part = draft.loads[layer][index] / total
                found += _of_expert(draft, ExpertId(layer, index), was, now, part, faster)
    return tuple(found)


def _faster(draft: Draft, layer: int, old: Layout, time: float) -> str:
    """What the layer's slowest host takes now, and what it would have taken."""
    ideal = sum(draft.loads[layer]) / sum(draft.fleet.rate)
    if not ideal:
        return ""
    now = f"{time / ideal:.2f} times the ideal"
    if not all(old):
        return f"; layer {layer}'s slowest host takes {now}"
    before = LayerTimes(draft.fleet, draft.loads[layer], old).settle()
    return f"; layer {layer}'s slowest host goes from {before / ideal:.2f} to {now}"


def _of_expert(
    draft: Draft, expert: ExpertId, was: list[int], now: list[int], part: float, faster: str
) -> list[Change]:
    ids = draft.fleet.ids
    carries = f"{expert} has {part:.1%} of its layer's load"
    if len(was) < draft.min_replicas:
        why = f"{carries}, and {len(was)} of at least {draft.min_replicas} replicas{faster}"
    elif len(now) == len(was):
        why = f"{carries}: moves from {' and '.join(ids[host] for host in was if host not in now)}{faster}"
    else:
        why = f"{carries}: from {len(was)} to {len(now)} replicas{faster}"
    return [
        Change(expert=expert, host=ids[host], what="retire" if host in was else "add", why=why)
        for host in sorted({*was} ^ {*now})
    ]
