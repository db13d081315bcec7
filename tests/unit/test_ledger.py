"""What the ledger believes, of messages that are lost, late, repeated and out of order."""

from __future__ import annotations

from expertmesh.control.actions import Drop, Limits, Load, Publish, StopHost
from expertmesh.control.ledger import Ledger
from expertmesh.control.state import HostStatus, Observed, ReplicaStatus
from expertmesh.ids import ExpertId, HostId

A = HostId("a")
E0, E1 = ExpertId(0, 0), ExpertId(0, 1)
LIMITS = Limits(load_timeout_s=20, drop_timeout_s=10, router_lease_s=30, retry_first_s=1, retry_longest_s=5)
LOAD = Load(host=A, expert=E0, deadline=20)
DROP = Drop(host=A, expert=E0, deadline=20)
SLOTS = (4,)


def ledger(*held: ExpertId, restarted: bool = False) -> Ledger:
    """One with a ready host that holds these experts, at time 1."""
    ledger = Ledger(LIMITS, 0, restarted=restarted)
    ledger.host_started(A, 0)
    ledger.report(A, SLOTS, held, asked_at=1)
    return ledger


def status(observed: Observed, expert: ExpertId = E0) -> ReplicaStatus | None:
    replica = observed.hosts[A].replicas.get(expert)
    return replica.status if replica else None


def publish(ledger: Ledger, epoch: int, now: float) -> None:
    ledger.begun(Publish(epoch=epoch, replicas={E0: (A,)}), now)


# --- replicas --------------------------------------------------------------------------------------------------------


def test_a_load_is_ready_when_the_host_says_so() -> None:
    book = ledger()
    assert status(book.observed(2)) is None
    book.begun(LOAD, 5)
    assert book.observed(6).hosts[A].replicas[E0].until == 20
    assert status(book.observed(6)) is ReplicaStatus.LOADING
    book.done(LOAD, 7)
    assert status(book.observed(7)) is ReplicaStatus.READY


def test_failed_loads_pause_twice_as_long_each_time_up_to_the_longest() -> None:
    book, now = ledger(), 10.0
    pauses = []
    for _ in range(4):
        order = Load(host=A, expert=E0, deadline=now + 20)
        book.begun(order, now)
        book.failed(order, "no such file", now)
        replica = book.observed(now).hosts[A].replicas[E0]
        assert (replica.status, replica.cause) == (ReplicaStatus.FAILED, "no such file")
        pauses.append(replica.until - now)
        now = replica.until
    assert pauses == [1, 2, 4, 5]
    assert book.observed(now).hosts[A].replicas[E0].failures == 4
    book.begun(order, now)
    book.done(order, now)
    assert book.observed(now).hosts[A].replicas[E0].failures == 0


def test_a_load_without_an_answer_has_failed_at_its_deadline_until_the_host_reports_it() -> None:
    book = ledger()
    book.begun(LOAD, 5)
    assert status(book.observed(19.9)) is ReplicaStatus.LOADING
    replica = book.observed(20).hosts[A].replicas[E0]
    assert (replica.status, replica.failures) == (ReplicaStatus.FAILED, 1)
    book.report(A, SLOTS, [E0], asked_at=21)
    assert status(book.observed(22)) is ReplicaStatus.READY


def test_a_report_that_finds_an_overdue_load_undone_counts_as_its_failure() -> None:
    book = ledger()
    book.begun(LOAD, 5)
    book.report(A, SLOTS, [], asked_at=21)
    assert book.observed(21).hosts[A].replicas[E0].failures == 1


def test_a_drop_without_an_answer_stays_one_until_a_report_from_after_its_deadline() -> None:
    for held, after in ([E0], ReplicaStatus.READY), ([], None):
        book = ledger(E0)
        book.begun(DROP, 5)
        book.failed(DROP, "connection reset", 6)
        book.report(A, SLOTS, [E0], asked_at=7)
        assert status(book.observed(8)) is ReplicaStatus.DROPPING
        assert status(book.observed(40)) is ReplicaStatus.DROPPING
        book.report(A, SLOTS, held, asked_at=41)
        assert status(book.observed(42)) is after


def test_a_report_asked_for_before_an_answer_came_does_not_undo_it() -> None:
    book = ledger(E1)
    book.begun(LOAD, 5)
    book.done(LOAD, 7)
    book.report(A, SLOTS, [E1], asked_at=6)
    assert status(book.observed(8)) is ReplicaStatus.READY
    other = Drop(host=A, expert=E1, deadline=20)
    book.begun(other, 9)
    book.done(other, 10)
    book.report(A, SLOTS, [E0, E1], asked_at=8)
    assert status(book.observed(11), E1) is None


def test_reports_out_of_order_do_not_undo_newer_ones() -> None:
    book = ledger()
    book.report(A, SLOTS, [E0], asked_at=9)
    book.report(A, SLOTS, [], asked_at=8)
    assert status(book.observed(10)) is ReplicaStatus.READY
    book.report(A, SLOTS, [], asked_at=11)
    book.report(A, SLOTS, [E0], asked_at=10)
    assert status(book.observed(12)) is None


def test_an_answer_to_an_order_that_is_no_longer_open_says_nothing() -> None:
    book = ledger()
    book.begun(LOAD, 5)
    book.observed(20)
    book.report(A, SLOTS, [E0], asked_at=21)
    drop = Drop(host=A, expert=E0, deadline=40)
    book.begun(drop, 22)
    book.done(LOAD, 23)
    assert status(book.observed(23)) is ReplicaStatus.DROPPING
    book.done(drop, 24)
    book.done(drop, 24)
    assert status(book.observed(25)) is None


def test_orders_and_reports_of_a_host_that_is_gone_change_nothing() -> None:
    book = ledger(E0)
    book.begun(DROP, 5)
    book.host_gone(A)
    book.done(DROP, 6)
    book.begun(LOAD, 6)
    book.report(A, SLOTS, [E0], asked_at=6)
    book.host_unreachable(A, 7)
    book.host_draining(A, 7)
    assert book.observed(8).hosts == {}


# --- hosts -----------------------------------------------------------------------------------------------------------


def test_a_silent_host_is_taken_back_by_a_report_asked_for_later_only() -> None:
    book = ledger(E0)
    book.host_unreachable(A, 5)
    book.report(A, SLOTS, [E0], asked_at=4)
    assert book.observed(6).hosts[A].status is HostStatus.UNREACHABLE
    book.report(A, SLOTS, [E0], asked_at=7)
    assert book.observed(8).hosts[A].status is HostStatus.READY


def test_a_host_that_drains_does_so_through_silence_and_may_be_kept_after_all() -> None:
    book = ledger()
    book.host_draining(A, 5)
    book.host_unreachable(A, 6)
    book.report(A, SLOTS, [], asked_at=7)
    assert book.observed(8).hosts[A].status is HostStatus.DRAINING
    book.host_draining(A, 9, draining=False)
    assert book.observed(9).hosts[A].status is HostStatus.READY


def test_a_stop_that_is_not_answered_is_over_at_its_deadline() -> None:
    book, stop = ledger(), StopHost(host=A, deadline=20)
    book.host_draining(A, 5)
    book.begun(stop, 6)
    assert book.observed(19).hosts[A].status is HostStatus.STOPPING
    assert book.observed(20).hosts[A].status is HostStatus.DRAINING
    book.done(stop, 21)
    assert book.observed(21).hosts == {}


# --- placements and routers ------------------------------------------------------------------------------------------


def test_placements_are_remembered_as_long_as_a_router_may_use_them() -> None:
    book = ledger(E0)
    publish(book, 1, 1)
    book.router_uses("slow", 1, 2)
    publish(book, 2, 3)
    publish(book, 3, 4)
    book.router_uses("quick", 3, 5)
    assert [p.epoch for p in book.observed(5).published] == [1, 2, 3]
    assert book.observed(5).oldest_epoch == 1
    book.router_uses("slow", 2, 6)
    book.router_uses("slow", 1, 7)  # overtaken by the one before
    assert book.observed(7).oldest_epoch == 2
    book.router_left("slow")
    assert [p.epoch for p in book.observed(8).published] == [3]


def test_a_router_that_is_not_heard_of_for_a_lease_is_gone() -> None:
    book = ledger(E0)
    publish(book, 1, 1)
    book.router_uses("dead", 1, 2)
    publish(book, 2, 3)
    assert book.observed(31.9).oldest_epoch == 1
    assert book.observed(32).oldest_epoch == 2


def test_a_router_that_has_no_placement_yet_uses_none() -> None:
    book = ledger(E0)
    publish(book, 1, 1)
    book.router_uses("new", 0, 2)
    assert book.observed(3).oldest_epoch == 1


def test_after_a_restart_nothing_is_settled_before_old_orders_are_past_and_hosts_were_asked_again() -> None:
    book = ledger(E0, restarted=True)
    book.adopt(7, {E0: (A,)}, 1)
    assert not book.observed(9).is_settled
    assert not book.observed(11).is_settled
    book.report(A, SLOTS, [E0], asked_at=11)
    assert book.observed(12).is_settled
    assert (book.observed(12).newest_epoch, book.observed(12).oldest_epoch) == (7, 0)
    assert not book.observed(29).is_history_known
    assert book.observed(30).is_history_known


def test_after_a_restart_without_a_note_routers_must_be_heard_of_before_anything_is_settled() -> None:
    book = ledger(E0, restarted=True)
    book.report(A, SLOTS, [E0], asked_at=29)
    assert not book.observed(29).is_settled
    book.report(A, SLOTS, [E0], asked_at=31)
    assert book.observed(32).is_settled


def test_what_was_adopted_is_worth_nothing_once_a_router_has_something_newer() -> None:
    book = ledger(E0, restarted=True)
    book.adopt(5, {E0: (A,)}, 1)
    book.router_uses("r", 7, 2)
    assert book.observed(3).published == ()
    assert book.observed(3).newest_epoch == 7
    assert not book.observed(3).is_history_known
    book.adopt(6, {E0: (A,)}, 4)
    assert book.observed(5).published == ()
    book.adopt(7, {E0: (A,)}, 6)
    assert book.observed(7).current == {E0: (A,)}


# --- doubts ----------------------------------------------------------------------------------------------------------


def test_a_doubted_replica_is_ready_again_when_the_doubt_is_cleared() -> None:
    book = ledger(E0)
    assert book.doubted(A, E0, "its rows are not finite", 5)
    replica = book.observed(5).hosts[A].replicas[E0]
    assert (replica.status, replica.cause) == (ReplicaStatus.QUARANTINED, "its rows are not finite")
    assert not book.doubted(A, E0, "again", 6)
    book.report(A, SLOTS, [E0], asked_at=7)
    assert status(book.observed(7)) is ReplicaStatus.QUARANTINED
    book.cleared(A, E0, 8)
    assert status(book.observed(8)) is ReplicaStatus.READY


def test_what_is_not_held_or_on_its_way_out_cannot_be_doubted() -> None:
    book = ledger(E0)
    assert not book.doubted(A, E1, "", 5)
    assert not book.doubted(HostId("gone"), E0, "", 5)
    book.begun(DROP, 5)
    assert not book.doubted(A, E0, "", 6)


def test_a_condemned_replica_stays_so_until_it_is_dropped_and_counts_as_a_failed_load_then() -> None:
    book = ledger(E0)
    book.doubted(A, E0, "its rows differ", 5)
    book.condemned(A, E0, "it answers wrongly", 6)
    book.cleared(A, E0, 7)
    assert status(book.observed(7)) is ReplicaStatus.CONDEMNED
    assert book.observed(7).banned(7) == book.observed(7).doubted == {(E0, A)}
    book.begun(DROP, 8)
    assert status(book.observed(8)) is ReplicaStatus.DROPPING
    book.done(DROP, 9)
    replica = book.observed(9).hosts[A].replicas[E0]
    assert (replica.status, replica.cause, replica.until) == (ReplicaStatus.FAILED, "it answers wrongly", 10)
    assert book.observed(9.5).banned(9.5) == {(E0, A)}
    assert book.observed(10).banned(10) == set()
    order = Load(host=A, expert=E0, deadline=40)
    book.begun(order, 11)
    book.done(order, 12)
    assert status(book.observed(12)) is ReplicaStatus.READY


def test_a_replica_that_is_condemned_again_and_again_is_loaded_ever_later() -> None:
    book, now = ledger(E0), 10.0
    pauses = []
    for _ in range(4):
        book.condemned(A, E0, "other weights", now)
        drop = Drop(host=A, expert=E0, deadline=now + 20)
        book.begun(drop, now)
        book.done(drop, now)
        pauses.append(book.observed(now).hosts[A].replicas[E0].until - now)
        load = Load(host=A, expert=E0, deadline=now + 40)
        book.begun(load, now)
        book.done(load, now)
    assert pauses == [1, 2, 4, 5]


def test_a_drop_of_a_condemned_replica_that_never_happened_leaves_it_condemned() -> None:
    book = ledger(E0)
    book.condemned(A, E0, "it answers wrongly", 6)
    book.begun(DROP, 8)
    book.report(A, SLOTS, [E0], asked_at=21)
    assert status(book.observed(22)) is ReplicaStatus.CONDEMNED
