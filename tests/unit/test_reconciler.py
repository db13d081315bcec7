"""Copy, publish, drain, drop: the reconciler's rules, one picture each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from expertmesh.control.actions import Drop, Limits, Load, Publish, StopHost
from expertmesh.control.capacity import check_drain, missing_slots
from expertmesh.control.progress import Watchdog, moves
from expertmesh.control.reconciler import Steps, reconcile
from expertmesh.control.state import HostState, HostStatus, Observed, Published, Replica, ReplicaStatus
from expertmesh.errors import ConfigError
from expertmesh.ids import ExpertId, HostId

A, B, C, D = (HostId(name) for name in "abcd")
E0, E1, E2, E3, E4, E5 = (ExpertId(0, index) for index in range(6))
NOW = 100.0
LIMITS = Limits(loads_per_host=2, loads_at_once=3, publish_every_s=0)
READY, DRAINING = HostStatus.READY, HostStatus.DRAINING


def ready(*experts: ExpertId) -> dict[ExpertId, Replica]:
    return {expert: Replica(status=ReplicaStatus.READY, since=0) for expert in experts}


def loading(*experts: ExpertId) -> dict[ExpertId, Replica]:
    return {expert: Replica(status=ReplicaStatus.LOADING, since=90, until=120) for expert in experts}


def dropping(*experts: ExpertId) -> dict[ExpertId, Replica]:
    return {expert: Replica(status=ReplicaStatus.DROPPING, since=90, until=120) for expert in experts}


def failed(expert: ExpertId, until: float) -> dict[ExpertId, Replica]:
    return {expert: Replica(status=ReplicaStatus.FAILED, since=90, until=until, failures=2, cause="no such file")}


def host(name: HostId, replicas: dict[ExpertId, Replica], slots: int = 4, status: HostStatus = READY) -> HostState:
    return HostState(id=name, status=status, since=0, slots=(slots,), replicas=replicas)


def placement(epoch: int, **held: list[ExpertId]) -> Published:
    """A placement, written by host."""
    experts = sorted({expert for experts in held.values() for expert in experts})
    replicas = {expert: tuple(HostId(h) for h in sorted(held) if expert in held[h]) for expert in experts}
    return Published(epoch=epoch, at=0, replicas=replicas)


def picture(*hosts: HostState, published: tuple[Published, ...] = (), oldest: int | None = None) -> Observed:
    """All that is there; every router uses the last placement unless `oldest` says otherwise."""
    newest = published[-1].epoch if published else 0
    return Observed(
        hosts={host.id: host for host in hosts},
        published=tuple(p for p in published if p.epoch >= (newest if oldest is None else oldest)),
        newest_epoch=newest,
        oldest_epoch=newest if oldest is None else oldest,
    )


def steps(desired: dict[ExpertId, list[HostId]], observed: Observed, limits: Limits = LIMITS) -> Steps:
    return reconcile(desired, observed, limits, NOW)


def loads(steps: Steps) -> list[tuple[HostId, ExpertId]]:
    return [(action.host, action.expert) for action in steps.actions if isinstance(action, Load)]


def drops(steps: Steps) -> list[tuple[HostId, ExpertId]]:
    return [(action.host, action.expert) for action in steps.actions if isinstance(action, Drop)]


def published(steps: Steps) -> dict[ExpertId, tuple[HostId, ...]] | None:
    return next((dict(action.replicas) for action in steps.actions if isinstance(action, Publish)), None)


# --- the life of a move ----------------------------------------------------------------------------------------------


def test_a_move_goes_copy_publish_drain_drop() -> None:
    desired = {E0: [B]}
    old, new = placement(1, a=[E0]), placement(2, b=[E0])

    copy = steps(desired, picture(host(A, ready(E0)), host(B, {}), published=(old,)))
    assert [action.key for action in copy.actions] == ["load 0:0 on b"]

    wait = steps(desired, picture(host(A, ready(E0)), host(B, loading(E0)), published=(old,)))
    assert wait.actions == wait.blocked == ()
    assert not wait.is_converged
    assert wait.wake_at == 120

    publish = steps(desired, picture(host(A, ready(E0)), host(B, ready(E0)), published=(old,)))
    assert [action.key for action in publish.actions] == ["publish epoch 2"]
    assert published(publish) == {E0: (B,)}

    drain = steps(desired, picture(host(A, ready(E0)), host(B, ready(E0)), published=(old, new), oldest=1))
    assert drain.actions == drain.blocked == ()
    assert not drain.is_converged

    drop = steps(desired, picture(host(A, ready(E0)), host(B, ready(E0)), published=(old, new)))
    assert drops(drop) == [(A, E0)]
    assert drop.actions[0].deadline == NOW + LIMITS.drop_timeout_s

    done = steps(desired, picture(host(A, {}), host(B, ready(E0)), published=(new,)))
    assert done == Steps(actions=(), blocked=(), remaining=0, wake_at=float("inf"))
    assert done.is_converged


def test_a_placement_names_a_replica_only_when_it_is_ready() -> None:
    observed = picture(
        host(A, ready(E0) | loading(E1)), host(B, ready(E1) | dropping(E0)), published=(placement(1, a=[E0]),)
    )
    assert published(steps({E0: [A, B], E1: [A, B]}, observed)) == {E0: (A,), E1: (B,)}


def test_the_first_placement_names_every_expert() -> None:
    desired = {E0: [A], E1: [B]}
    assert published(steps(desired, picture(host(A, ready(E0)), host(B, loading(E1))))) is None
    assert published(steps(desired, picture(host(A, ready(E0)), host(B, ready(E1))))) == {E0: (A,), E1: (B,)}


def test_later_placements_do_not_wait_for_an_expert_that_was_lost() -> None:
    observed = picture(host(A, ready(E0, E2)), published=(placement(1, a=[E0], b=[E1]),))
    assert published(steps({E0: [A], E1: [A], E2: [A]}, observed)) == {E0: (A,), E2: (A,)}


def test_small_changes_are_told_together_and_urgent_ones_at_once() -> None:
    limits = replace(LIMITS, publish_every_s=5)
    one = replace(placement(1, a=[E0], b=[E1]), at=97)
    calm = picture(host(A, ready(E0, E1)), host(B, ready(E1)), published=(one,))
    assert published(steps({E0: [A], E1: [A, B]}, calm, limits)) is None
    assert steps({E0: [A], E1: [A, B]}, calm, limits).wake_at == 102
    died = picture(host(A, ready(E0, E1)), published=(one,))
    assert published(steps({E0: [A], E1: [A]}, died, limits)) == {E0: (A,), E1: (A,)}


# --- what is never taken away ----------------------------------------------------------------------------------------


def test_the_loss_of_an_only_copy_is_told_at_once() -> None:
    limits = replace(LIMITS, publish_every_s=5)
    recent = replace(placement(1, a=[E0], b=[E1]), at=NOW - 1)
    lost = steps({E0: [B], E1: [B]}, picture(host(B, ready(E1)), published=(recent,)), limits)
    assert published(lost) == {E1: (B,)}
    told = replace(placement(2, b=[E1]), at=NOW - 1)
    assert published(steps({E0: [B], E1: [B]}, picture(host(B, ready(E1)), published=(told,)), limits)) is None


def test_copies_that_were_short_are_told_of_at_once_when_the_last_of_them_is_there() -> None:
    limits = replace(LIMITS, publish_every_s=5, min_replicas=2)
    recent = replace(placement(1, a=[E0, E1]), at=NOW - 1)
    desired = {E0: [A, B], E1: [A, B]}
    some = picture(host(A, ready(E0, E1)), host(B, ready(E0) | loading(E1)), published=(recent,))
    assert published(steps(desired, some, limits)) is None
    every = picture(host(A, ready(E0, E1)), host(B, ready(E0, E1)), published=(recent,))
    assert published(steps(desired, every, limits)) == {E0: (A, B), E1: (A, B)}


def test_a_replica_in_quarantine_is_not_named_at_once_even_if_there_is_no_other() -> None:
    limits = replace(LIMITS, publish_every_s=5)
    recent = replace(placement(1, a=[E0, E1]), at=NOW - 1)
    for status in (ReplicaStatus.QUARANTINED, ReplicaStatus.CONDEMNED):
        doubted = {E0: Replica(status=status, since=NOW)}
        found = steps({E0: [A], E1: [A]}, picture(host(A, ready(E1) | doubted), published=(recent,)), limits)
        assert published(found) == {E1: (A,)}
        assert loads(found) == drops(found) == []
        assert not found.is_converged


def test_a_condemned_replica_is_dropped_when_no_router_can_know_of_it_wanted_or_not_alone_or_not() -> None:
    condemned = {E0: Replica(status=ReplicaStatus.CONDEMNED, since=NOW, cause="it answers wrongly")}
    old, new = placement(1, a=[E0, E1]), placement(2, a=[E1])
    observed = picture(host(A, ready(E1) | condemned), published=(old, new), oldest=1)
    assert drops(steps({E0: [A], E1: [A]}, observed)) == []
    observed = picture(host(A, ready(E1) | condemned), published=(new,))
    assert drops(steps({E0: [A], E1: [A]}, observed)) == [(A, E0)]
    assert drops(steps({E1: [A]}, observed)) == [(A, E0)]


def test_the_last_ready_replica_stays_named_and_held_wanted_or_not() -> None:
    observed = picture(host(A, ready(E0)), host(B, {}), published=(placement(1, a=[E0]),))
    for desired in ({}, {E0: []}, {E0: [HostId("nowhere")]}):
        answer = steps(desired, observed)
        assert published(answer) is None
        assert not drops(answer)
        assert answer.blocked


def test_a_replica_is_not_dropped_before_routers_know_of_another() -> None:
    # E0 was lost, and came back on both hosts at once: routers know of neither yet.
    observed = picture(host(A, ready(E0, E1)), host(B, ready(E0)), published=(placement(1, a=[E1]),))
    answer = steps({E0: [A], E1: [A]}, observed)
    assert published(answer) == {E0: (A,), E1: (A,)}
    assert not drops(answer)


def test_min_replicas_are_kept_until_the_new_ones_are_ready() -> None:
    limits = replace(LIMITS, min_replicas=2)
    one = placement(1, a=[E0], b=[E0])
    half = picture(host(A, ready(E0)), host(B, ready(E0)), host(C, ready(E0)), host(D, loading(E0)), published=(one,))
    kept = published(steps({E0: [C, D]}, half, limits))
    assert kept == {E0: (A, C)}
    full = picture(host(A, ready(E0)), host(B, ready(E0)), host(C, ready(E0)), host(D, ready(E0)), published=(one,))
    assert published(steps({E0: [C, D]}, full, limits)) == {E0: (C, D)}


def test_a_hot_expert_keeps_its_replicas_while_new_ones_load() -> None:
    observed = picture(
        host(A, ready(E0)), host(B, ready(E0)), host(C, {}), host(D, {}), published=(placement(1, a=[E0], b=[E0]),)
    )
    answer = steps({E0: [C, D]}, observed)
    assert published(answer) is None
    assert loads(answer) == [(C, E0), (D, E0)]


def test_what_is_kept_beyond_the_minimum_gives_way_when_its_slot_is_needed() -> None:
    # B is full with copies of E0 and E1 that others will have; what B is to hold needs both slots.
    one = placement(1, a=[E0, E1, E2, E3], b=[E0, E1])
    observed = picture(host(A, ready(E0, E1, E2, E3)), host(B, ready(E0, E1), slots=2), host(C, {}), published=(one,))
    desired = {E0: [A, C], E1: [A, C], E2: [A, B], E3: [A, B]}
    assert published(steps(desired, observed)) == {E0: (A,), E1: (A,), E2: (A,), E3: (A,)}


def test_a_replica_on_a_silent_host_stays_named_only_while_there_is_no_other() -> None:
    one = placement(1, a=[E0, E1], b=[E1])
    observed = picture(host(A, ready(E0, E1), status=HostStatus.UNREACHABLE), host(B, ready(E1)), published=(one,))
    assert published(steps({E0: [A], E1: [B]}, observed)) == {E0: (A,), E1: (B,)}
    assert published(steps({E0: [B], E1: [B]}, picture(host(B, ready(E1)), published=(one,)))) == {E1: (B,)}


def test_what_a_host_holds_that_has_not_reported_yet_stays_named() -> None:
    one = placement(1, a=[E0], b=[E1])
    observed = picture(host(A, {}, status=HostStatus.STARTING), host(B, ready(E1, E2)), published=(one,))
    assert published(steps({E0: [A], E1: [B], E2: [B]}, observed)) == {E0: (A,), E1: (B,), E2: (B,)}


def test_while_hosts_are_silent_nothing_is_published_over_a_placement_that_nobody_remembers() -> None:
    for status in (HostStatus.STARTING, HostStatus.UNREACHABLE):
        observed = replace(picture(host(A, {}, status=status), host(B, ready(E1))), newest_epoch=7)
        assert published(steps({E1: [B]}, observed)) is None
    answer = steps({E1: [B]}, replace(picture(host(B, ready(E1))), newest_epoch=7))
    assert [action.key for action in answer.actions] == ["publish epoch 8"]


def test_nothing_is_dropped_or_published_until_a_restarted_controller_has_settled() -> None:
    one, two = placement(1, a=[E0]), placement(2, b=[E0])
    observed = picture(host(A, ready(E0)), host(B, ready(E0)), published=(one, two))
    assert drops(steps({E0: [B]}, observed))
    assert steps({E0: [B]}, replace(observed, is_settled=False)).actions == ()
    assert steps({E0: [A]}, replace(observed, is_settled=False)).actions == ()


def test_nothing_is_dropped_while_a_router_may_use_a_placement_that_nobody_remembers() -> None:
    observed = picture(host(A, ready(E0)), host(B, ready(E0)), published=(placement(7, b=[E0]),))
    assert drops(steps({E0: [B]}, observed))
    assert not drops(steps({E0: [B]}, replace(observed, oldest_epoch=6)))


# --- slots -----------------------------------------------------------------------------------------------------------


def test_loads_and_drops_under_way_take_slots() -> None:
    desired = {E0: [A], E1: [A], E2: [A], E3: [A]}
    for busy in (loading(E0), dropping(E4)):
        observed = picture(
            host(A, ready(E1) | busy, slots=3), host(B, ready(E0, E4)), published=(placement(1, a=[E1]),)
        )
        assert len(loads(steps(desired, observed))) == 1


def test_experts_of_different_shapes_take_different_slots() -> None:
    other = ExpertId(1, 0)
    observed = replace(
        picture(HostState(id=A, status=READY, since=0, slots=(1, 1), replicas=ready(E0))), layer_shapes=(0, 1)
    )
    assert loads(steps({E0: [A], E1: [A], other: [A]}, observed)) == [(A, other)]


def test_experts_that_nobody_has_are_loaded_first_then_those_short_of_copies() -> None:
    limits = replace(LIMITS, min_replicas=2, loads_per_host=1)
    observed = picture(host(A, ready(E1, E2, E3)), host(B, ready(E2)), host(C, {}), published=(placement(1, a=[E1]),))
    desired = {E2: [A, B, C], E1: [A, C], E0: [C, B], E3: [A, C]}
    assert loads(steps(desired, observed, limits)) == [(C, E0), (B, E0)]
    found = picture(
        host(A, ready(E1, E2, E3)), host(B, ready(E2, E0)), host(C, ready(E0)), published=(placement(1, a=[E1]),)
    )
    assert loads(steps(desired, found, limits)) == [(C, E1)]


def test_a_load_that_frees_a_slot_on_a_full_host_comes_before_one_that_does_not() -> None:
    # A is full and is to hold E4; E2 has to leave A for B first. E0 and E1 on B are only more copies.
    one = placement(1, a=[E0, E1, E2], c=[E4])
    observed = picture(host(A, ready(E0, E1, E2), slots=3), host(B, {}), host(C, ready(E4)), published=(one,))
    desired = {E0: [A, B], E1: [A, B], E2: [B], E4: [C, A]}
    assert loads(steps(desired, observed, replace(LIMITS, loads_per_host=1))) == [(B, E2)]


def test_no_more_loads_at_once_than_the_limits_allow() -> None:
    desired = {ExpertId(0, i): [A, B, C] for i in range(5)}
    observed = picture(host(A, {}, 9), host(B, {}, 9), host(C, {}, 9))
    wanted = loads(steps(desired, observed))
    assert len(wanted) == LIMITS.loads_at_once
    assert max([h for h, _ in wanted].count(h) for h in (A, B, C)) <= LIMITS.loads_per_host
    assert loads(steps(desired, picture(host(A, loading(E0, E1), 9), host(B, loading(E2), 9), host(C, {}, 9)))) == []


def test_a_failed_load_waits_for_its_pause_to_end_and_others_do_not_wait_for_it() -> None:
    observed = picture(host(A, failed(E0, until=105)))
    pausing = steps({E0: [A], E1: [A]}, observed)
    assert loads(pausing) == [(A, E1)]
    assert pausing.wake_at == 105
    assert not pausing.blocked
    assert loads(steps({E0: [A]}, picture(host(A, failed(E0, until=100))))) == [(A, E0)]


def test_two_full_hosts_that_are_to_swap_are_blocked_and_one_free_slot_unblocks_them() -> None:
    one = placement(1, a=[E0, E1], b=[E2, E3])
    desired = {E0: [B], E1: [B], E2: [A], E3: [A]}
    full = steps(desired, picture(host(A, ready(E0, E1), 2), host(B, ready(E2, E3), 2), published=(one,)))
    assert full.actions == ()
    assert full.blocked == (
        "host a has no free slot for 0:2, 0:3: 2 others there have nowhere to go",
        "host b has no free slot for 0:0, 0:1: 2 others there have nowhere to go",
    )
    assert loads(steps(desired, picture(host(A, ready(E0, E1), 3), host(B, ready(E2, E3), 2), published=(one,))))


def test_more_than_a_host_has_slots_for_is_loaded_as_far_as_it_goes_and_then_said_to_be_too_much() -> None:
    desired = {E0: [A], E1: [A], E2: [A]}
    assert loads(steps(desired, picture(host(A, ready(E0), 2)))) == [(A, E1)]
    full = steps(desired, picture(host(A, ready(E0, E1), 2), published=(placement(1, a=[E0, E1]),)))
    assert full.blocked[0] == "host a is to hold 3 experts and has 2 slots"


def test_hosts_that_are_gone_or_draining_are_given_nothing_and_named_as_the_reason() -> None:
    one = placement(1, a=[E0])
    observed = picture(host(A, ready(E0)), host(B, {}), published=(one,))
    answer = steps({E0: [A, D]}, observed)
    assert answer.blocked == ("host d is to hold 0:0 and is gone",)
    assert answer.remaining == 1


# --- draining hosts --------------------------------------------------------------------------------------------------


def test_a_draining_host_is_emptied_and_then_stopped() -> None:
    one, two = placement(1, a=[E0]), placement(2, b=[E0])
    desired = {E0: [B]}
    full = picture(host(A, ready(E0), status=DRAINING), host(B, {}), published=(one,))
    assert [action.key for action in steps(desired, full).actions] == ["load 0:0 on b"]
    copied = picture(host(A, ready(E0), status=DRAINING), host(B, ready(E0)), published=(one, two))
    assert [action.key for action in steps(desired, copied).actions] == ["drop 0:0 on a"]
    dropped = picture(host(A, dropping(E0), status=DRAINING), host(B, ready(E0)), published=(two,))
    assert steps(desired, dropped).actions == ()
    empty = steps(desired, picture(host(A, {}, status=DRAINING), host(B, ready(E0)), published=(two,)))
    assert empty.actions == (StopHost(host=A, deadline=NOW + LIMITS.stop_timeout_s, why="drained"),)


def test_nothing_is_loaded_onto_a_draining_host_even_if_wanted_there() -> None:
    answer = steps({E0: [A], E1: [A]}, picture(host(A, ready(E0), status=DRAINING), published=(placement(1, a=[E0]),)))
    assert answer.actions == ()
    assert answer.blocked == ("host a is to hold 0:0, 0:1 and is draining",)


def test_drains_that_cannot_be_are_refused_in_one_line() -> None:
    observed = picture(host(A, ready(E0), 4), host(B, ready(E0), 4), host(C, {}, 4, status=DRAINING))
    check_drain(A, observed, [4], 1)
    with pytest.raises(ConfigError, match=r"^host 'x': there is none; hosts are a, b, c$"):
        check_drain(HostId("x"), observed, [4], 1)
    with pytest.raises(ConfigError, match=r"^host 'a' cannot be drained: .* lack 2 slots to hold 6 experts 1 times"):
        check_drain(A, observed, [6], 1)
    with pytest.raises(ConfigError, match="lack 4 slots to hold 4 experts 2 times"):
        check_drain(A, observed, [4], 2)


def test_slots_suffice_exactly_when_copies_on_distinct_hosts_can_be_dealt_out() -> None:
    def can_deal(slots: tuple[int, ...], experts: int, copies: int) -> bool:
        left = list(slots)
        for _ in range(experts):
            left.sort(reverse=True)
            if len(left) < copies or (copies and left[copies - 1] < 1):
                return False
            left[:copies] = [n - 1 for n in left[:copies]]
        return True

    for slots in [(1, 1), (5, 1), (3, 3, 1), (9, 2, 2), (4, 4, 4), (2, 9, 9), (0, 3)]:
        for experts in range(1, 6):
            for copies in range(1, 4):
                enough = not any(missing_slots([(n,) for n in slots], [experts], copies))
                assert enough == can_deal(slots, experts, copies), (slots, experts, copies)


# --- progress --------------------------------------------------------------------------------------------------------


def test_moves_under_way_are_listed_with_their_deadline_and_failures() -> None:
    one, two = placement(1, a=[E0]), replace(placement(2, a=[E0, E1]), at=95)
    observed = picture(
        host(A, ready(E0) | loading(E1) | failed(E2, until=130)),
        host(B, {}, status=DRAINING),
        published=(one, two),
        oldest=1,
    )
    listed = [(move.what, move.since, move.until, move.note) for move in moves(observed)]
    never = float("inf")
    assert listed == [
        ("draining b", 0, never, ""),
        ("failed 0:2 on a", 90, 130, "failed 2 times: no such file"),
        ("loading 0:1 on a", 90, 120, ""),
        ("waiting for routers at epoch 1 to take 2", 95, never, ""),
    ]


def test_the_watchdog_tells_a_loop_that_stopped_from_one_that_gets_nowhere() -> None:
    stuck = Steps(actions=(), blocked=(), remaining=3, wake_at=float("inf"))
    watchdog = Watchdog(0.0, loop_s=30, progress_s=60)
    assert watchdog.alarm(29) == ""
    assert watchdog.alarm(30) == "the control loop has not turned for 30 s"
    for now in range(40, 110, 10):
        watchdog.turned(stuck, now)
    assert watchdog.alarm(100) == "no progress for 60 s, with 3 replicas to go"
    watchdog.turned(replace(stuck, remaining=2), 101)
    assert watchdog.alarm(101) == ""
    for now in range(110, 300, 10):
        watchdog.turned(replace(stuck, remaining=0), now)
    assert watchdog.alarm(290) == ""
