"""The planner on small cases that can be checked by eye, its errors, and its speed."""

from __future__ import annotations

import math
import time
from collections import Counter

import numpy as np
import pytest

from expertmesh.control.planner import HostSupply, Plan, PlanOptions, plan
from expertmesh.errors import ConfigError
from expertmesh.ids import ExpertId, HostId

ALL_SLOTS = PlanOptions(landing_slots=0)


def hosts_of(count: int, slots: int, **fields) -> list[HostSupply]:
    return [HostSupply(host=HostId(f"h{i:03}"), slots=slots, **fields) for i in range(count)]


def host(name: str, slots: int, **fields) -> HostSupply:
    return HostSupply(host=HostId(name), slots=slots, **fields)


def held(planned: Plan) -> Counter[str]:
    return Counter(of for hosts in planned.replicas.values() for of in hosts)


def replicas(planned: Plan, layer: int = 0) -> list[int]:
    return [len(hosts) for expert, hosts in sorted(planned.replicas.items()) if expert.layer == layer]


# --- where replicas go -----------------------------------------------------------------------------------------------


def test_a_hot_expert_gets_replicas_and_the_layer_becomes_ideal() -> None:
    planned = plan([[90, 10, 10, 10]], hosts_of(4, 4))
    assert replicas(planned)[0] > 1
    assert planned.max_time[0] == pytest.approx(planned.ideal[0]) == pytest.approx(30)


def test_equal_loads_get_no_replicas_more_than_they_must() -> None:
    assert replicas(plan([[5.0] * 16], hosts_of(4, 8))) == [1] * 16


def test_spare_slots_go_to_the_layer_where_they_gain_most() -> None:
    planned = plan([[10, 10, 10, 10], [37, 1, 1, 1]], hosts_of(4, 3), None, ALL_SLOTS)
    assert sum(replicas(planned, 0)) == 4
    assert replicas(planned, 1)[0] >= 3


def test_without_any_load_experts_are_spread_evenly() -> None:
    planned = plan([[0] * 12, [0] * 12], hosts_of(4, 9))
    assert set(held(planned).values()) == {6}
    for layer in range(2):
        in_layer = Counter(of for expert, hosts in planned.replicas.items() if expert.layer == layer for of in hosts)
        assert set(in_layer.values()) == {3}
    assert planned.max_time == planned.ideal == (0, 0)


def test_fast_hosts_get_more_load() -> None:
    supplies = [host("fast", 9, rate=3.0), host("slow", 9, rate=1.0)]
    planned = plan([[10.0] * 8], supplies)
    assert planned.max_time[0] == pytest.approx(20)
    assert held(planned) == {"fast": 6, "slow": 2}


def test_a_host_without_rate_is_used_only_when_all_others_are_full() -> None:
    supplies = [host("dead", 9, rate=0.0), host("ok", 4)]
    assert held(plan([[4, 3, 2, 1]], supplies, None, ALL_SLOTS)) == {"ok": 4}
    planned = plan([[5, 4, 3, 2, 0]], supplies, None, ALL_SLOTS)
    assert planned.replicas[ExpertId(0, 4)] == ("dead",)
    assert planned.max_time[0] == pytest.approx(14)
    assert plan([[5, 4, 3, 2, 1]], supplies, None, ALL_SLOTS).max_time == (math.inf,)


def test_cold_experts_go_to_the_cheap_host_and_hot_ones_make_way() -> None:
    supplies = [host("a-dear", 40, cost=5.0), host("b-cheap", 40, cost=1.0)]
    planned = plan([[80.0] + [2.0] * 20], supplies)
    assert held(planned) == {"b-cheap": 21, "a-dear": 1}
    assert planned.max_time[0] == pytest.approx(planned.ideal[0])


def test_cold_experts_go_to_a_dear_host_when_the_cheap_one_would_be_too_slow() -> None:
    supplies = [host("a-dear", 40, cost=5.0), host("b-cheap", 40, cost=1.0, rate=0.1)]
    planned = plan([[10.0] * 22], supplies)
    assert held(planned) == {"b-cheap": 2, "a-dear": 20}


def test_one_slot_stays_empty_on_each_host_unless_it_is_needed() -> None:
    assert max(held(plan([[9, 1, 1, 1]], hosts_of(2, 3))).values()) == 2
    assert set(held(plan([[9, 1, 1, 1, 1, 1]], hosts_of(2, 3))).values()) == {3}


# --- failure domains -------------------------------------------------------------------------------------------------


def test_two_replicas_are_on_distinct_nodes() -> None:
    supplies = [host(f"{node}{i}", 6, node=node) for node in "ab" for i in range(3)]
    planned = plan([[8, 7, 6, 5, 4, 3, 2, 1]], supplies, None, PlanOptions(min_replicas=2))
    assert planned.survives == "node"
    assert all(len({of[0] for of in hosts}) == 2 for hosts in planned.replicas.values())


def test_racks_come_before_nodes_when_all_are_known() -> None:
    supplies = [host(f"h{i}", 8, node=f"n{i}", rack=f"r{i // 3}") for i in range(6)]
    assert plan([[1.0] * 8], supplies, None, PlanOptions(min_replicas=2)).survives == "rack"
    unknown = [*supplies[:5], host("h5", 8, node="n5")]
    assert plan([[1.0] * 8], unknown, None, PlanOptions(min_replicas=2)).survives == "node"


def test_a_node_with_exactly_enough_room_is_not_wasted_on_hot_experts() -> None:
    """All ten slots of node b are needed for second replicas, whatever the load asks for."""
    supplies = [host("a0", 10, node="a"), host("a1", 10, node="a"), host("b0", 10, node="b")]
    loads = [[100.0, 80.0, 60.0] + [1.0] * 7]
    planned = plan(loads, supplies, None, PlanOptions(min_replicas=2, landing_slots=0))
    assert planned.survives == "node"
    assert held(planned)["b0"] == 10


def test_replicas_on_one_node_are_spread_out_once_there_is_another() -> None:
    """Every slot is taken, so two experts must change places."""
    supplies = [host("a0", 2, node="a"), host("a1", 2, node="a"), host("b0", 2, node="b"), host("b1", 2, node="b")]
    current = {
        ExpertId(0, 0): (HostId("a0"), HostId("a1")),
        ExpertId(0, 1): (HostId("a0"), HostId("a1")),
        ExpertId(0, 2): (HostId("b0"), HostId("b1")),
        ExpertId(0, 3): (HostId("b0"), HostId("b1")),
    }
    planned = plan([[1.0] * 4], supplies, current, PlanOptions(min_replicas=2, landing_slots=0))
    assert planned.survives == "node"
    assert planned.moves == 4


def test_three_replicas_in_two_nodes_are_not_all_in_one() -> None:
    supplies = [host(f"{node}{i}", 4, node=node) for node in "ab" for i in range(3)]
    planned = plan([[4, 3, 2, 1]], supplies, None, PlanOptions(min_replicas=3))
    assert planned.survives == "node"
    assert min(replicas(planned)) == 3


def test_one_replica_each_survives_nothing() -> None:
    assert plan([[1.0] * 4], hosts_of(4, 4)).survives == "nothing"


# --- staying put -----------------------------------------------------------------------------------------------------


def zipf(experts: int, seed: int) -> list[float]:
    loads = 1000 / np.arange(1, experts + 1)
    np.random.default_rng(seed).shuffle(loads)
    return loads.tolist()


def test_a_small_change_of_load_changes_nothing() -> None:
    loads, supplies = [zipf(64, 0)], hosts_of(8, 11)
    first = plan(loads, supplies)
    noisy = [(np.array(loads[0]) * np.random.default_rng(1).lognormal(0, 0.05, 64)).tolist()]
    again = plan(noisy, supplies, first.replicas)
    assert again.replicas == first.replicas
    assert again.reasons == ()


def test_a_gain_below_the_least_is_left_alone_and_one_above_is_taken() -> None:
    supplies = hosts_of(2, 5)
    current = {ExpertId(0, e): (HostId("h000" if e < 3 else "h001"),) for e in range(4)}
    loads = [[30.0, 30.0, 20.0, 60.0]]  # 80 against 60, and 70 is ideal
    assert plan(loads, supplies, current, PlanOptions(min_gain=0.2)).moves == 0
    planned = plan(loads, supplies, current, PlanOptions(min_gain=0.05))
    assert planned.moves == 1
    assert planned.max_time[0] == pytest.approx(70)


def test_moves_must_be_worth_their_cost() -> None:
    supplies = hosts_of(2, 5)
    current = {ExpertId(0, e): (HostId("h000" if e < 3 else "h001"),) for e in range(4)}
    loads = [[30.0, 30.0, 20.0, 60.0]]
    assert plan(loads, supplies, current, PlanOptions(move_cost=1.0)).moves == 0


def test_a_lost_host_costs_only_what_it_held() -> None:
    loads, supplies = [zipf(64, 0), zipf(64, 1)], hosts_of(8, 40)
    options = PlanOptions(min_replicas=2)
    first = plan(loads, supplies, None, options)
    lost = supplies[3].host
    planned = plan(loads, [supply for supply in supplies if supply.host != lost], first.replicas, options)
    assert min(map(len, planned.replicas.values())) == 2
    assert planned.moves <= held(first)[lost]
    stayed = [e for e, hosts in first.replicas.items() if set(hosts) - {lost} <= set(planned.replicas[e])]
    assert len(stayed) >= 0.9 * len(first.replicas)


def test_a_new_host_is_used_when_it_makes_the_layer_faster() -> None:
    supplies = hosts_of(2, 9)
    first = plan([zipf(8, 0)], supplies)
    planned = plan([zipf(8, 0)], [*supplies, host("new", 9)], first.replicas)
    assert held(planned)["new"] > 0
    assert planned.max_time[0] <= planned.ideal[0] * 1.05
    assert planned.moves <= 3


def test_when_the_topic_shifts_new_hot_experts_gain_replicas_and_old_ones_lose_theirs() -> None:
    supplies = hosts_of(4, 6)
    hot, cold = [60.0] + [5.0] * 7, [5.0] * 7 + [60.0]
    first = plan([hot], supplies)
    assert replicas(first)[0] > 1
    second = plan([cold], supplies, first.replicas)
    assert replicas(second)[7] > 1
    assert replicas(second)[0] == 1
    assert second.max_time[0] <= second.ideal[0] * 1.05
    assert second.moves < 6


def test_replicas_of_an_expert_that_cools_a_little_stay() -> None:
    supplies = hosts_of(4, 6)
    first = plan([[60.0] + [5.0] * 7], supplies)
    assert replicas(plan([[50.0] + [6.0] * 7], supplies, first.replicas)) == replicas(first)


def test_a_host_whose_slots_shrank_gives_up_what_is_needed_least() -> None:
    supplies = hosts_of(3, 6)
    first = plan([[50.0, 9.0, 8.0, 7.0, 6.0, 5.0]], supplies, None, ALL_SLOTS)
    smaller = [host("h000", 1), *supplies[1:]]
    planned = plan([[50.0, 9.0, 8.0, 7.0, 6.0, 5.0]], smaller, first.replicas, ALL_SLOTS)
    assert held(planned)["h000"] <= 1
    assert min(replicas(planned)) == 1


def test_every_change_says_why_in_figures() -> None:
    supplies = hosts_of(4, 6)
    first = plan([[60.0] + [5.0] * 7], supplies)
    assert first.reasons[0].why == "first placement of layer 0: its slowest host takes 1.05 times the ideal"
    second = plan([[5.0] * 7 + [60.0]], supplies, first.replicas)
    added = [change for change in second.reasons if change.what == "add" and change.expert.index == 7]
    assert added
    assert added[0].why.startswith("63.2% of the layer's load, from 1 to ")
    assert " times the ideal" in added[0].why


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loads", "supplies", "options", "message"),
    [
        ([[1.0] * 9], hosts_of(2, 3), {}, "the pools are too small: .* 3 slots are missing"),
        ([[1.0] * 4], [host("a", 9), host("b", 2)], {"min_replicas": 2}, "2 slots are missing"),
        ([[1.0]], hosts_of(2, 3), {"min_replicas": 3}, "min_replicas is 3 but there are 2 hosts"),
        ([[1.0]], [], {}, "min_replicas is 1 but there are 0 hosts"),
        ([[1.0]], hosts_of(2, 3), {"min_replicas": 0}, "min_replicas is 0: it must be at least 1"),
        ([[1.0]], hosts_of(2, 3), {"landing_slots": -1}, "landing_slots is -1"),
        ([[1.0]], hosts_of(2, 3), {"min_gain": math.nan}, "min_gain is nan"),
        ([[1.0]], hosts_of(2, 3), {"move_cost": -0.1}, "move_cost is -0.1"),
        ([[1.0, math.nan]], hosts_of(2, 3), {}, "loads: expert 0:1 has nan"),
        ([[1.0], [-2.0]], hosts_of(2, 3), {}, "loads: expert 1:0 has -2.0"),
        ([[1.0, 2.0], [1.0]], hosts_of(2, 3), {}, "loads: layer 1 has 1 experts and another has 2"),
        ([[1.0]], [host("a", -1)], {}, "inventory: slots of host a is -1"),
        ([[1.0]], [host("a", 1, rate=-1.0)], {}, "inventory: rate of host a is -1.0"),
        ([[1.0]], [host("a", 1, rate=math.inf)], {}, "inventory: rate of host a is inf"),
        ([[1.0]], [host("a", 1), host("a", 1)], {}, "inventory: host a is listed twice"),
        ([[1.0]], [host("a", 1, rate=0.0)], {}, "inventory: every host has rate 0"),
    ],
)
def test_senseless_input_is_refused_in_one_line(loads, supplies, options, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan(loads, supplies, None, PlanOptions(**options))
    assert "\n" not in str(caught.value)


def test_a_placement_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="current: expert 2:0 is not among the loads"):
        plan([[1.0]], hosts_of(1, 3), {ExpertId(2, 0): (HostId("h000"),)})


def test_layers_of_another_shape_are_empty_and_take_nothing() -> None:
    planned = plan([[], [3.0, 1.0], []], hosts_of(2, 3))
    assert {expert.layer for expert in planned.replicas} == {1}
    assert planned.max_time[0] == planned.ideal[0] == 0


# --- speed -----------------------------------------------------------------------------------------------------------


def least_s(call, times: int = 3) -> float:
    least = math.inf
    for _ in range(times):
        started = time.process_time()
        call()
        least = min(least, time.process_time() - started)
    return least


def test_a_whole_large_model_is_planned_in_a_fraction_of_a_second() -> None:
    """Loose, for machines that are busy with other things: 0.2 s on one that is not."""
    loads = [zipf(256, seed) for seed in range(61)]
    assert least_s(lambda: plan(loads, hosts_of(32, 61 * 9), None, ALL_SLOTS)) < 1.5


@pytest.mark.parametrize("rate", [1.0, 0.5], ids=["alike", "unlike"])
def test_planning_grows_hardly_faster_than_experts_and_hosts(rate) -> None:
    """From 32 hosts to 500, n log n is 25 times more."""

    def seconds(experts: int, count: int) -> float:
        supplies = [host(f"h{i:03}", experts // count + 1, rate=rate if i % 2 else 1.0) for i in range(count)]
        loads = [zipf(experts, 0)]
        return least_s(lambda: plan(loads, supplies, None, ALL_SLOTS))

    assert seconds(4000, 500) < 4 * 25 * seconds(256, 32)
