"""What holds of every plan, whatever the loads, hosts and current placement."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from expertmesh.control.planner import HostSupply, Plan, PlanOptions, plan
from expertmesh.ids import ExpertId, HostId

EXAMPLES = settings(deadline=None, max_examples=150)


def supply_of(draw, i: int) -> HostSupply:
    return HostSupply(
        host=HostId(f"h{i}"),
        slots=draw(st.integers(0, 12)),
        rate=draw(st.sampled_from([1.0, 1.0, 0.5, 2.0, 0.37, 0.0])),
        node=draw(st.sampled_from(["", "n1", "n2", "n3"])),
        rack=draw(st.sampled_from(["r1", "r1", "r2", ""])),
        cost=draw(st.sampled_from([0.0, 0.0, 1.0])),
    )


@st.composite
def inventories(draw) -> list[HostSupply]:
    return [supply_of(draw, i) for i in range(draw(st.integers(1, 7)))]


def loads_of(draw, layers: int, experts: int) -> list[list[float]]:
    load = st.one_of(st.just(0.0), st.floats(0.1, 10), st.floats(10, 1000))
    return draw(st.lists(st.lists(load, min_size=experts, max_size=experts), min_size=layers, max_size=layers))


def fits(inventory: list[HostSupply], experts: int, replicas: int) -> bool:
    """Gale and Ryser: each of the experts on `replicas` distinct hosts."""
    return sum(min(supply.slots, experts) for supply in inventory) >= replicas * experts


@st.composite
def cases(draw):
    """Loads, an inventory that has room, options."""
    inventory = draw(inventories())
    assume(any(supply.rate > 0 for supply in inventory))
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    options = PlanOptions(
        min_replicas=draw(st.integers(1, 3)),
        landing_slots=draw(st.integers(0, 2)),
        min_gain=draw(st.sampled_from([0.0, 0.05, 0.3])),
        move_cost=draw(st.sampled_from([0.0, 0.1])),
    )
    assume(options.min_replicas <= len(inventory) and fits(inventory, layers * experts, options.min_replicas))
    return loads_of(draw, layers, experts), inventory, options


@st.composite
def replans(draw):
    """A plan, and what it is planned again with: other loads, some hosts gone, some come, some with other slots."""
    loads, inventory, options = draw(cases())
    before = plan(loads, inventory, None, options)
    after = loads_of(draw, len(loads), len(loads[0])) if draw(st.booleans()) else loads
    kept = [supply for supply in inventory if draw(st.integers(0, 4))]
    kept = [replace(s, slots=max(0, s.slots - 1)) if not draw(st.integers(0, 4)) else s for s in kept]
    come = [supply_of(draw, i) for i in range(10, 10 + draw(st.integers(0, 2)))]
    hosts = kept + come
    assume(len(hosts) >= options.min_replicas and any(supply.rate > 0 for supply in hosts))
    assume(fits(hosts, len(loads) * len(loads[0]), options.min_replicas))
    return before, after, hosts, options


def held_by(planned: Plan) -> dict[HostId, int]:
    return {h: sum(h in of for of in planned.replicas.values()) for h in set(chain(*planned.replicas.values()))}


def check_is_sound(planned: Plan, loads, inventory, options) -> None:
    assert set(planned.replicas) == {ExpertId(n, e) for n, layer in enumerate(loads) for e in range(len(layer))}
    slots = {supply.host: supply.slots for supply in inventory}
    for hosts in planned.replicas.values():
        assert len(set(hosts)) == len(hosts) >= options.min_replicas
        assert list(hosts) == sorted(hosts)
    for host, held in held_by(planned).items():
        assert held <= slots[host]
    for expert, shares in planned.split.items():
        assert set(shares) == set(planned.replicas[expert])
        assert min(shares.values()) >= 0
        assert sum(shares.values()) == pytest.approx(1)


def survives(planned: Plan, inventory: list[HostSupply]) -> str:
    """Brute force: fail every single host, node and rack in turn."""
    answer = "nothing"
    names = {
        "host": {supply.host: supply.host for supply in inventory},
        "node": {supply.host: supply.node or ("own", supply.host) for supply in inventory},
        "rack": {supply.host: supply.rack for supply in inventory},
    }
    for kind, of in names.items():
        if kind == "rack" and not all(of.values()):
            break
        for failed in set(of.values()):
            if any(all(of[host] == failed for host in hosts) for hosts in planned.replicas.values()):
                return answer
        answer = kind
    return answer


def least_time(planned: Plan, loads, layer: int, inventory: list[HostSupply]) -> float:
    """The linear program over all splits of one layer."""
    rate = {supply.host: supply.rate for supply in inventory}
    position = {host: i for i, host in enumerate(rate)}
    pairs = []
    for index, load in enumerate(loads[layer]):
        useful = [host for host in planned.replicas[ExpertId(layer, index)] if rate[host] > 0]
        if load and not useful:
            return float("inf")
        pairs += [(index, host) for host in useful]
    limits = np.zeros((len(rate), len(pairs) + 1))
    sums = np.zeros((len(loads[layer]), len(pairs) + 1))
    for column, (index, host) in enumerate(pairs):
        limits[position[host], column] = 1
        sums[index, column] = 1
    limits[:, -1] = [-r for r in rate.values()]
    objective = [0] * len(pairs) + [1]
    wanted = [load if sums[index].any() else 0 for index, load in enumerate(loads[layer])]
    return linprog(objective, A_ub=limits, b_ub=np.zeros(len(rate)), A_eq=sums, b_eq=wanted, method="highs").fun


@EXAMPLES
@given(cases())
def test_a_first_plan_is_sound(case) -> None:
    loads, inventory, options = case
    planned = plan(loads, inventory, None, options)
    check_is_sound(planned, loads, inventory, options)
    assert planned.moves == sum(map(len, planned.replicas.values())) == len(planned.reasons)


@EXAMPLES
@given(replans())
def test_a_plan_from_another_is_sound_and_its_changes_are_what_differs(case) -> None:
    before, loads, inventory, options = case
    planned = plan(loads, inventory, before.replicas, options)
    check_is_sound(planned, loads, inventory, options)
    there = {supply.host for supply in inventory}
    old = {(e, host) for e, hosts in before.replicas.items() for host in hosts if host in there}
    new = {(e, host) for e, hosts in planned.replicas.items() for host in hosts}
    assert {(c.expert, c.host) for c in planned.reasons if c.what == "add"} == new - old
    assert {(c.expert, c.host) for c in planned.reasons if c.what == "retire"} == old - new
    assert len(planned.reasons) == len(new ^ old)
    assert planned.moves == len(new - old)


@EXAMPLES
@given(replans())
def test_planning_again_changes_nothing(case) -> None:
    before, loads, inventory, options = case
    planned = plan(loads, inventory, before.replicas, options)
    again = plan(loads, inventory, planned.replicas, options)
    assert again.moves == 0
    assert again.replicas == planned.replicas
    assert again.reasons == ()


@EXAMPLES
@given(cases())
def test_a_first_plan_stays(case) -> None:
    loads, inventory, options = case
    planned = plan(loads, inventory, None, options)
    assert plan(loads, inventory, planned.replicas, options).reasons == ()


@EXAMPLES
@given(replans(), st.randoms(use_true_random=False))
def test_the_order_of_hosts_and_of_current_replicas_does_not_matter(case, random) -> None:
    before, loads, inventory, options = case
    planned = plan(loads, inventory, before.replicas, options)
    shuffled = random.sample(inventory, len(inventory))
    current = {e: tuple(random.sample(hosts, len(hosts))) for e, hosts in reversed(before.replicas.items())}
    assert plan(loads, shuffled, current, options) == planned


@EXAMPLES
@given(replans())
def test_what_a_plan_survives_is_what_brute_force_finds(case) -> None:
    before, loads, inventory, options = case
    planned = plan(loads, inventory, before.replicas, options)
    assert planned.survives == survives(planned, inventory)


@EXAMPLES
@given(replans())
def test_the_times_are_those_of_the_linear_program(case) -> None:
    before, loads, inventory, options = case
    planned = plan(loads, inventory, before.replicas, options)
    rate = {supply.host: supply.rate for supply in inventory}
    for layer, of in enumerate(loads):
        assert planned.max_time[layer] == pytest.approx(least_time(planned, loads, layer, inventory), rel=1e-6)
        assert planned.ideal[layer] == pytest.approx(sum(of) / sum(rate.values()))
        work = dict.fromkeys(rate, 0.0)
        for index, load in enumerate(of):
            for host, share in planned.split[ExpertId(layer, index)].items():
                work[host] += share * load
        if planned.max_time[layer] < float("inf"):
            assert max(w / rate[h] for h, w in work.items() if w > 1e-9 * sum(of) or rate[h]) == pytest.approx(
                planned.max_time[layer], rel=1e-6
            )


@EXAMPLES
@given(cases(), st.data())
def test_a_layer_changes_only_to_become_faster(case, data) -> None:
    """Same hosts, other loads: nothing forces a change, so what was is the worst that may come."""
    loads, inventory, options = case
    before = plan(loads, inventory, None, options)
    after = loads_of(data.draw, len(loads), len(loads[0]))
    planned = plan(after, inventory, before.replicas, options)
    for layer in range(len(loads)):
        was = least_time(before, after, layer, inventory)
        assert planned.max_time[layer] <= was * (1 + 1e-6)
        added = [c for c in planned.reasons if c.expert.layer == layer and c.what == "add"]
        if added:
            assert planned.max_time[layer] <= was * (1 - options.min_gain) * (1 + 1e-6)


@EXAMPLES
@given(cases())
def test_two_replicas_reach_as_far_as_the_slots_do(case) -> None:
    """With room for every expert in two racks, or nodes, a failure of any one loses nothing."""
    loads, inventory, options = case
    assume(options.min_replicas >= 2)
    racks = {"n1": "r1", "n2": "r1", "n3": "r2", "": "r2"}
    inventory = [replace(supply, rack=racks[supply.node]) for supply in inventory]
    num_experts = sum(map(len, loads))
    # Hosts without rate are avoided where that is possible, and then count for nothing.
    working = [supply for supply in inventory if supply.rate > 0]
    usable = working if fits(working, num_experts, options.min_replicas) else inventory

    def has_room(domain) -> bool:
        """For all replicas of all experts, not all of an expert's in one domain."""
        room: dict[object, int] = {}
        for supply in usable:
            room[domain(supply)] = room.get(domain(supply), 0) + min(supply.slots, num_experts)
        most = (options.min_replicas - 1) * num_experts
        return sum(min(n, most) for n in room.values()) >= options.min_replicas * num_experts

    expected = "host"
    if has_room(lambda supply: supply.node or supply.host):
        expected = "node"
    if has_room(lambda supply: supply.rack):
        expected = "rack"
    assert plan(loads, inventory, None, options).survives == expected


@EXAMPLES
@given(cases())
def test_landing_slots_are_left_where_everything_fits_without_them(case) -> None:
    loads, inventory, options = case
    inventory = [replace(supply, rate=supply.rate or 1.0) for supply in inventory]
    options = replace(options, min_replicas=1)
    num_experts = sum(map(len, loads))
    without = [replace(supply, slots=max(0, supply.slots - options.landing_slots)) for supply in inventory]
    assume(fits(without, num_experts, 1))
    held = held_by(plan(loads, inventory, None, options))
    for supply in without:
        assert held.get(supply.host, 0) <= supply.slots


@EXAMPLES
@given(cases())
def test_a_host_without_rate_gets_nothing_if_that_can_be_avoided(case) -> None:
    loads, inventory, options = case
    working = [supply for supply in inventory if supply.rate > 0]
    assume(fits(working, sum(map(len, loads)), options.min_replicas))
    held = held_by(plan(loads, inventory, None, options))
    assert not any(held.get(supply.host) for supply in inventory if not supply.rate)
