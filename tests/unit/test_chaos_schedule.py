"""Which fault is due, and whom it hits: the same for the same seed, and nothing that the mesh does not allow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from expertmesh.chaos.look import Look, Wanted
from expertmesh.chaos.schedule import Schedule, Shot
from expertmesh.chaos.script import parse_script

KILL = [{"kind": "kill"}]


def look_at(held: dict[str, list[int]], *, experts: int = 4, replicas: int = 2, **more: Any) -> Look:
    """A mesh of one layer whose hosts hold these experts."""
    hosts = [{"id": name, "state": "ready", "node": f"node-of-{name}", "pid": 0} for name in held]
    placed = [{"id": name, "experts": [[0, expert] for expert in of]} for name, of in held.items()]
    placement = {"num_experts": [experts], "hosts": placed}
    return Look(began_s=0.0, hosts=hosts, placement=placement, wanted=Wanted(replicas=replicas), **more)


EVERYTHING = [0, 1, 2, 3]
COVERED = look_at({"cpu-0": EVERYTHING, "cpu-1": EVERYTHING, "cpu-2": [0, 1]})
BARE = look_at({"cpu-0": [0, 1, 2], "cpu-1": [0, 1], "cpu-2": [1, 3]})


def schedule(*steps: dict[str, Any], seed: int = 1, **more: Any) -> Schedule:
    values = {"name": "test", "mesh": {}, "steps": list(steps), "duration": "100s"} | more
    return Schedule(parse_script(values, "test"), seed)


def shots(planned: Schedule, look: Look, *, until_s: float = 30.0, tick_s: float = 0.25) -> list[tuple[float, Shot]]:
    """All that comes while the mesh looks like this."""
    ticks = [number * tick_s for number in range(int(until_s / tick_s))]
    return [(at_s, shot) for at_s in ticks for shot in planned.due(at_s, look)]


def test_one_seed_draws_the_same_shots_and_another_draws_others() -> None:
    steps = [{"faults": KILL, "every": "1s", "jitter": "500ms"}, {"faults": KILL, "at": "3s", "every": "2s"}]
    first, again, other = (shots(schedule(*steps, seed=seed), COVERED) for seed in (1, 1, 2))
    assert first == again
    assert [(at, shot.targets) for at, shot in first] != [(at, shot.targets) for at, shot in other]
    assert {shot.targets[0] for _, shot in first} == {"cpu-0", "cpu-1", "cpu-2"}
    assert len({shot.seed for _, shot in first}) == len(first)


def test_what_one_step_draws_does_not_depend_on_the_others() -> None:
    step = {"faults": KILL, "every": "1s", "jitter": "500ms"}
    alone = shots(schedule(step), COVERED)
    beside = shots(schedule(step, {"faults": KILL, "every": "3s"}), COVERED)
    assert [(at, shot) for at, shot in beside if shot.step == 0] == alone


def test_a_step_happens_once_at_its_moment() -> None:
    planned = schedule({"faults": KILL, "at": "5s"})
    assert [(at, shot.turn) for at, shot in shots(planned, COVERED)] == [(5.0, 0)]
    assert planned.is_done


def test_what_was_to_come_once_and_did_not_is_named() -> None:
    planned = schedule({"faults": KILL, "at": "5s"}, {"faults": KILL, "at": "200s"}, {"faults": KILL, "every": "9s"})
    assert planned.missed() == "step 0, due at 5.0 s, never came"
    shots(planned, COVERED)
    assert planned.missed() is None


def test_a_rate_is_kept_and_what_had_to_wait_does_not_come_in_a_burst() -> None:
    planned = schedule({"faults": KILL, "every": "2s"})
    assert [at for at, _ in shots(planned, COVERED, until_s=9)] == [0.0, 2.0, 4.0, 6.0, 8.0]
    empty = look_at({})
    assert [planned.due(at, empty) for at in (10.0, 12.0, 15.0)] == [[], [], []]
    assert len(planned.due(20.0, COVERED)) == 1
    assert [len(planned.due(at, COVERED)) for at in (20.5, 21.5, 22.0, 23.0, 24.0)] == [0, 0, 1, 0, 1]


def test_a_condition_holds_a_fault_back_until_it_is_so() -> None:
    planned = schedule({"faults": KILL, "when": "covered", "times": 2})
    assert planned.due(1.0, BARE) == []
    assert len(planned.due(2.0, COVERED)) == 1
    assert planned.due(3.0, BARE) == []
    assert len(planned.due(4.0, COVERED)) == 1
    assert planned.is_done


def test_what_waits_for_longer_than_the_script_is_patient_is_named() -> None:
    planned = schedule({"faults": KILL, "when": "covered"}, patience="10s")
    planned.due(1.0, BARE)
    assert planned.stuck(10.0) is None
    stuck = planned.stuck(12.0)
    assert stuck is not None
    assert "step 0, turn 0: waited 11 s for 'covered'" in stuck


def test_only_a_sole_holder_is_hit_where_one_is_meant() -> None:
    planned = schedule({"target": "sole holder", "faults": KILL, "every": "1s"})
    assert {shot.targets for _, shot in shots(planned, BARE)} == {("cpu-0",), ("cpu-2",)}
    assert shots(planned, look_at({"cpu-0": EVERYTHING, "cpu-1": EVERYTHING})) == []


def test_every_target_is_who_it_says() -> None:
    targets = {
        "every host": ("cpu-0", "cpu-1", "cpu-2"),
        "host cpu-1": ("cpu-1",),
        "router": ("router",),
        "controller": ("controller",),
    }
    for target, expected in targets.items():
        (shot,) = schedule({"target": target, "faults": KILL}).due(0.0, COVERED)
        assert shot.targets == expected
    assert schedule({"target": "host cpu-9", "faults": KILL}).due(0.0, COVERED) == []
    (order,) = schedule({"scale": {"hosts": 3}}).due(0.0, COVERED)
    assert order.targets == ()


def test_the_node_of_the_control_plane_is_spared() -> None:
    step = {"target": "node", "faults": [{"kind": "kill_node"}], "every": "1s"}
    spared = replace(COVERED, here=frozenset({"node-of-cpu-0"}))
    assert {shot.targets for _, shot in shots(schedule(step), spared)} == {("cpu-1",), ("cpu-2",)}
    alone = replace(COVERED, here=frozenset({"node-of-cpu-0", "node-of-cpu-1", "node-of-cpu-2"}))
    assert shots(schedule(step), alone) == []


def test_after_a_deadly_fault_nothing_is_aimed_by_the_same_look() -> None:
    planned = schedule({"faults": KILL}, {"faults": KILL})
    assert [len(planned.due(0.0, COVERED)) for _ in range(3)] == [1, 1, 0]


def test_the_dead_hold_nothing() -> None:
    assert COVERED.is_covered
    without = replace(COVERED, dead=frozenset({"cpu-1"}))
    assert (without.is_covered, without.ready, without.sole_holders) == (False, ["cpu-0", "cpu-2"], ["cpu-0"])
    assert not Look(began_s=0.0, error="no mesh answers").holds("covered")


def test_a_mesh_is_whole_when_nothing_is_missing_or_on_its_way() -> None:
    held = {"cpu-0": EVERYTHING, "cpu-1": EVERYTHING}
    wanted = Wanted(replicas=2, fewest_hosts=2, most_hosts=2, routers=2)
    whole = replace(look_at(held), wanted=wanted, routers=2)
    assert whole.is_whole
    assert not replace(whole, routers=1).is_whole
    assert not replace(whole, wanted=replace(wanted, fewest_hosts=3, most_hosts=3)).is_whole
    leaving = [*whole.hosts, {"id": "cpu-2", "state": "draining", "node": "n", "pid": 0}]
    assert not replace(whole, hosts=leaving).is_whole
    assert replace(whole, hosts=leaving).is_moving
