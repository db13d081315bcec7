"""Change a layer that is slower than it need be, if that gains more than it costs; retire what is not needed.

A layer is changed step by step, or laid out anew when that is worth its moves. All decisions compare exact times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from expertmesh.control.planner.copies import deserved, heat_unit, may_retire_one
from expertmesh.control.planner.draft import Draft, LayerTimes, Layout, num_moves
from expertmesh.control.planner.layout import lay_out
from expertmesh.control.planner.steps import relieve

if TYPE_CHECKING:
    from expertmesh.control.planner.values import PlanOptions

_SAME = 1e-9
"""Relative difference of two times that is rounding."""
_LEAST_GAIN = 1e-6
"""Changes must gain more than retiring may lose by rounding, or planning might not end."""


def improve(draft: Draft, layer: int, options: PlanOptions) -> bool:
    """Make one layer faster by at least `min_gain`; whether it was changed.

    Each change makes the layer faster, so repeating this ends.
    """
    loads, layout = draft.loads[layer], draft.layers[layer]
    ideal = draft.fleet.ideal(loads)
    now = draft.times(layer).slowest()
    if now <= ideal * (1 + options.min_gain):
        return False

    def gain(candidate: Layout) -> float:
        time = LayerTimes(draft.fleet, loads, candidate).settle()
        if now == float("inf"):
            return 0.0 if time == now else 1.0
        return 1 - time / now - options.move_cost * num_moves(layout, candidate) / len(loads)

    stepped = relieve(draft, layer, goal=ideal * (1 + options.min_gain / 2))
    best, most = stepped, gain(stepped)
    if most < 1 - ideal * (1 + options.min_gain) / now:
        anew = _anew(draft, layer, options)
        if anew is not None and (of_anew := gain(anew)) > most:
            best, most = anew, of_anew
    if most < max(options.min_gain, _LEAST_GAIN):
        return False
    draft.replace(layer, best)
    return True


def _anew(draft: Draft, layer: int, options: PlanOptions) -> Layout | None:
    """The layer laid out anew, in its own slots and the free ones; None if not all that must be fits that way."""
    loads, layout, fleet = draft.loads[layer], draft.layers[layer], draft.fleet
    own = [0] * len(fleet.ids)
    for hosts in layout:
        for host in hosts:
            own[host] += 1
    spare = sum(own) + sum(draft.free) // len(draft.layers) - draft.min_replicas * len(loads)
    quota = [held + free for held, free in zip(own, draft.free, strict=True)]
    counts = deserved([loads], fleet.num_working, draft.min_replicas, spare)[0]
    anew = lay_out(fleet, loads, counts, quota, layout, options)
    if all(len(hosts) >= draft.min_replicas and fleet.spans(hosts) for hosts in anew):
        return anew
    return None


def retire(draft: Draft, layer: int) -> bool:
    """Drop replicas of experts that have gone cold and that the layer is as fast without; whether there were any."""
    loads, layout, fleet = draft.loads[layer], draft.layers[layer], draft.fleet
    unit = heat_unit(loads, fleet.num_working)
    cold = [
        e
        for e, hosts in enumerate(layout)
        if len(hosts) > draft.min_replicas and may_retire_one(loads[e], len(hosts), unit)
    ]
    if not cold:
        return False
    before = draft.times(layer)
    limit = before.slowest() * (1 + _SAME)
    trial = [list(hosts) for hosts in layout]
    for e in sorted(cold, key=lambda e: (loads[e], e)):
        while len(trial[e]) > draft.min_replicas and may_retire_one(loads[e], len(trial[e]), unit):
            host = _least_missed(draft, trial[e], before)
            if host is None:
                break
            trial[e].remove(host)
    if LayerTimes(fleet, loads, trial).settle() > limit:
        trial = _retire_singly(draft, layer, trial, limit)
    if trial == layout:
        return False
    draft.replace(layer, trial)
    return True


def _least_missed(draft: Draft, hosts: list[int], times: LayerTimes) -> int | None:
    """The replica that is best given up: on the dearest host, of these on the one with most to do."""
    fleet = draft.fleet
    may_go = [host for host in hosts if draft.can_lose(hosts, host)]
    return max(
        may_go,
        key=lambda host: (fleet.rate[host] == 0, fleet.cost[host], times.work[host] / (fleet.rate[host] or 1), host),
        default=None,
    )


def _retire_singly(draft: Draft, layer: int, all_gone: Layout, limit: float) -> Layout:
    """Of the replicas that are not in `all_gone`, drop one after the other, unless the layer would get slower."""
    loads, layout = draft.loads[layer], draft.layers[layer]
    trial = [list(hosts) for hosts in layout]
    for expert, (hosts, left) in enumerate(zip(layout, all_gone, strict=True)):
        for host in hosts:
            if host not in left:
                trial[expert].remove(host)
                if LayerTimes(draft.fleet, loads, trial).settle() > limit:
                    trial[expert] = sorted((*trial[expert], host))
    return trial
