"""What the elastic bench makes of what it saw, on stories small enough to check by hand."""

from __future__ import annotations

from expertmesh.bench.crowd import Answer, verdict
from expertmesh.bench.elastic import _follow, _settled


def timeline(*imbalances: float | None) -> list[dict[str, float | None]]:
    return [{"at_s": 0.5 * i, "imbalance": imbalance} for i, imbalance in enumerate(imbalances)]


def test_it_is_settled_from_when_the_imbalance_stays_low() -> None:
    assert _settled(timeline(1.4, 1.1, 1.3, 1.1, 1.0)) == 1.5
    assert _settled(timeline(1.0, 1.1)) == 0.0
    assert _settled(timeline(1.0, 1.0, 1.2)) is None
    assert _settled(timeline(1.2, None, 1.1)) == 0.5


def test_hot_and_cold_experts_are_those_whose_share_changed_much() -> None:
    before = {(0, 0): 2, (0, 1): 1, (0, 2): 1, (0, 3): 1}
    after = {(0, 0): 1, (0, 1): 3, (0, 2): 1, (0, 3): 1}
    found = _follow(before, after, [[60.0, 5.0, 20.0, 15.0]], [[10.0, 700.0, 200.0, 90.0]])
    assert found["hot"] == {"experts": 1, "gained": 1, "lost": 0, "replicas_before": 1, "replicas_after": 3}
    assert found["cold"] == {"experts": 1, "gained": 0, "lost": 1, "replicas_before": 2, "replicas_after": 1}


def test_a_verdict_counts_failures_and_wrong_answers() -> None:
    right = {"a": [1, 2], "b": [3, 4]}
    answers = [
        Answer("a", 0.0, [1, 2], [0.1, 0.2]),
        Answer("b", 0.0, [3, 9], [0.1, 0.2]),
        Answer("b", 0.0, [], [], "503: no"),
    ]
    assert verdict(answers, right) == {
        "requests": 3,
        "failed": 1,
        "first_failures": ["503: no"],
        "wrong_answers": 1,
    }


def test_gaps_are_between_the_tokens_of_one_answer() -> None:
    assert Answer("a", 0.0, [1, 2, 3], [1.0, 1.5, 1.5]).gaps_s == [(1.5, 0.5), (1.5, 0.0)]
