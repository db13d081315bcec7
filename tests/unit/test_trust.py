"""Whose word counts when a replica is doubted."""

from __future__ import annotations

from expertmesh.control.trust import FRESH_S, MEMORY_S, NONSENSE_PER_HOST, STRIKES, Trust
from expertmesh.hosts.digest import ReplicaDigest
from expertmesh.ids import ExpertId, HostId

A, B, C = (HostId(name) for name in "abc")
E0, E1 = ExpertId(0, 0), ExpertId(0, 1)


def digest(weights: bytes, answer: bytes = b"y") -> ReplicaDigest:
    return ReplicaDigest(weights=weights, answer=answer)


def test_hosts_that_read_the_same_agree_whatever_their_devices_answer() -> None:
    trust = Trust()
    assert trust.learn(E0, A, digest(b"w", b"cpu"), 0) == []
    assert trust.learn(E0, B, digest(b"w", b"gpu"), 0) == []
    assert trust.learn(E1, B, digest(b"other"), 0) == []


def test_of_two_that_read_other_weights_the_second_is_wrong_even_if_the_first_is_gone() -> None:
    trust = Trust()
    trust.learn(E0, A, digest(b"w"), 0)
    assert trust.learn(E0, B, digest(b"damaged"), 0) == [B]
    trust.forget_host(A)
    assert trust.learn(E0, B, digest(b"damaged"), 0) == [B]


def test_a_third_host_decides_which_of_two_was_right() -> None:
    trust = Trust()
    trust.learn(E0, A, digest(b"damaged"), 0)
    assert trust.learn(E0, B, digest(b"w"), 0) == [B]
    assert trust.learn(E0, C, digest(b"w"), 0) == [A]
    assert trust.learn(E0, A, digest(b"w"), 0) == []


def test_however_many_read_an_expert_a_damaged_one_stays_in_the_minority() -> None:
    trust = Trust()
    for number in range(10):
        assert trust.learn(E0, HostId(f"h{number}"), digest(b"w"), 0) == []
    assert trust.learn(E0, A, digest(b"damaged"), 0) == [A]
    assert trust.learn(E0, B, digest(b"damaged"), 0) == [A, B]


def test_a_host_that_read_first_and_reads_anew_sets_the_measure_anew() -> None:
    trust = Trust()
    trust.learn(E0, A, digest(b"damaged"), 0)
    assert trust.learn(E0, A, digest(b"w"), 1) == []
    assert trust.learn(E0, B, digest(b"w"), 2) == []


def test_weights_that_a_host_never_read_are_compared_with_nothing() -> None:
    trust = Trust()
    trust.learn(E0, A, digest(b""), 0)
    assert trust.learn(E0, B, digest(b"w"), 0) == []


def test_a_replica_passes_while_it_answers_as_when_it_was_loaded() -> None:
    trust = Trust()
    trust.learn(E0, A, digest(b"w", b"y"), 0)
    assert trust.passes(E0, A, digest(b"w", b"y"), 1)
    assert not trust.passes(E0, A, digest(b"w", b"z"), 1)
    trust.forget(E0, A)
    assert not trust.passes(E0, A, digest(b"w", b"y"), 1)


def test_a_test_is_fresh_for_a_while() -> None:
    trust = Trust()
    assert not trust.is_fresh(E0, A, 0)
    trust.learn(E0, A, digest(b"w"), 10)
    assert trust.is_fresh(E0, A, 10 + FRESH_S - 0.1)
    assert not trust.is_fresh(E0, A, 10 + FRESH_S)
    trust.passes(E0, A, digest(b"w"), 20)
    assert trust.is_fresh(E0, A, 21)


def test_a_host_is_not_trusted_after_a_few_doubts_within_minutes() -> None:
    trust = Trust()
    assert [trust.strike(A, at) for at in range(STRIKES)] == [False] * (STRIKES - 1) + [True]
    assert not trust.strike(A, STRIKES), "it starts anew"
    slowly = [trust.strike(B, at * (MEMORY_S / 2 + 1)) for at in range(10)]
    assert not any(slowly)


def test_doubts_that_come_together_are_one() -> None:
    trust = Trust()
    assert not any(trust.strike(A, 0.01 * i) for i in range(50))


def test_a_router_that_doubts_everything_for_nothing_is_no_longer_believed_for_a_while() -> None:
    trust = Trust()
    for i in range(NONSENSE_PER_HOST * 3):
        assert trust.believes("r", 3, i)
        trust.unfounded("r", (A, B)[i % 2], i)
    assert not trust.believes("r", 3, 20)
    assert trust.believes("another", 3, 20)
    assert trust.believes("r", 3, 20 + MEMORY_S)


def test_a_router_that_doubts_one_host_is_believed_however_often_it_does() -> None:
    trust = Trust()
    for i in range(100):
        trust.unfounded("r", A, i)
    assert trust.believes("r", 2, 100)
