"""Capacity against plain loops: what is kept, what goes elsewhere, what is lost; and the random second expert."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import ConfigError
from expertmesh.gates.capacity import gshard, limit_to_capacity, switch
from expertmesh.gates.choices import NO_EXPERT, best_k, count_tokens
from expertmesh.gates.spec import expert_capacity

quick = settings(deadline=None, max_examples=60)


@st.composite
def crowds(draw):
    """(scores, choices, capacity, priority): often more tokens for an expert than it has room for."""
    tokens, num_experts = draw(st.integers(0, 20)), draw(st.integers(1, 8))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.rand(tokens, num_experts, generator=rng) + draw(st.sampled_from([0, 1])) * torch.arange(num_experts)
    if draw(st.booleans()):
        scores = (4 * scores).round() / 4
    index = best_k(scores, draw(st.integers(1, num_experts)))
    if draw(st.booleans()):  # some tokens want fewer
        index = index.masked_fill(torch.rand(index.shape, generator=rng) < 0.2, NO_EXPERT)
    priority = draw(st.sampled_from([None, scores.amax(dim=1)]))
    return scores, index, draw(st.integers(1, 12)), priority


def in_order(priority: torch.Tensor | None, tokens: int) -> list[int]:
    return sorted(range(tokens), key=lambda t: (0 if priority is None else -priority[t].item(), t))


def serve_by_hand(scores, index, capacity, priority, *, next_best: bool) -> list[list[int]]:
    """Choice by choice, round by round, token by token."""
    tokens, width = index.shape
    kept = [[NO_EXPERT] * width for _ in range(tokens)]
    room = [capacity] * scores.shape[1]
    for k in range(width):
        asks = {t: index[t, k].item() for t in in_order(priority, tokens) if index[t, k] != NO_EXPERT}
        while asks:
            turned_away = []
            for t, expert in asks.items():
                if room[expert] and expert not in kept[t]:
                    kept[t][k] = expert
                    room[expert] -= 1
                else:
                    turned_away.append(t)
            asks = {}
            for t in turned_away if next_best else []:
                free = [e for e in range(scores.shape[1]) if room[e] and e not in kept[t]]
                if free:
                    asks[t] = max(free, key=lambda e: (scores[t, e].item(), -e))
    return kept


@quick
@given(crowds(), st.booleans())
def test_choices_are_kept_as_by_hand(crowd, next_best: bool) -> None:
    scores, index, capacity, priority = crowd
    overflow = "next-best" if next_best else "drop"
    before = index.clone()
    kept = limit_to_capacity(index, scores, capacity, overflow=overflow, priority_T=priority)
    assert kept.tolist() == serve_by_hand(scores, index, capacity, priority, next_best=next_best)
    assert torch.equal(index, before)
    assert (count_tokens(kept, scores.shape[1]) <= capacity).all()


@quick
@given(crowds())
def test_dropping_takes_away_and_changes_nothing_else(crowd) -> None:
    scores, index, capacity, priority = crowd
    kept = limit_to_capacity(index, scores, capacity, priority_T=priority)
    assert ((kept == index) | (kept == NO_EXPERT)).all()
    wanted, served = (count_tokens(some, scores.shape[1]) for some in (index, kept))
    assert torch.equal(served, wanted.clamp(max=capacity))


@quick
@given(crowds())
def test_next_best_loses_a_choice_only_when_its_token_has_every_expert_with_room(crowd) -> None:
    scores, index, capacity, priority = crowd
    kept = limit_to_capacity(index, scores, capacity, overflow="next-best", priority_T=priority)
    room = capacity - count_tokens(kept, scores.shape[1])
    for wanted, got in zip(index.tolist(), kept.tolist(), strict=True):
        held = [expert for expert in got if expert != NO_EXPERT]
        assert len(held) == len(set(held))
        if len(held) < sum(expert != NO_EXPERT for expert in wanted):
            assert all(expert in held for expert in range(scores.shape[1]) if room[expert] > 0)


@quick
@given(crowds())
def test_overflow_is_an_error_exactly_when_something_would_be_lost(crowd) -> None:
    scores, index, capacity, _ = crowd
    kept = limit_to_capacity(index, scores, capacity)
    if torch.equal(kept, index):
        assert torch.equal(limit_to_capacity(index, scores, capacity, overflow="error"), index)
    else:
        with pytest.raises(ConfigError, match=r"gate\.overflow .* raise gate\.capacity_factor"):
            limit_to_capacity(index, scores, capacity, overflow="error")


@quick
@given(st.integers(0, 500), st.integers(1, 64), st.integers(1, 8), st.floats(0.01, 8))
def test_capacity_is_the_even_share_times_the_factor_and_never_below_one(
    tokens: int, num_experts: int, k: int, factor: float
) -> None:
    capacity = expert_capacity(tokens, num_experts, k, factor)
    share = factor * k * tokens / num_experts
    assert capacity >= 1
    assert share <= capacity < max(share, 1) + 1


@quick
@given(crowds())
def test_a_dropped_token_has_no_weight_and_a_kept_one_its_probability(crowd) -> None:
    logits, _, capacity, _ = crowd
    choices = switch(logits, capacity=capacity)
    best = logits.softmax(dim=1).amax(dim=1)
    for t, (expert,) in enumerate(choices.index_TK.tolist()):
        assert choices.weights_TK[t, 0] == (0 if expert == NO_EXPERT else best[t])


def gshard_by_hand(logits: torch.Tensor, capacity: int, uniform: list[float]) -> torch.Tensor:
    """Algorithm 1 of the paper, line by line, where a second expert that is not taken needs no room."""
    tokens, num_experts = logits.shape
    gates = torch.zeros(tokens, num_experts, dtype=torch.float64)
    count = [0] * num_experts
    tops = []
    for t in range(tokens):
        probs = logits[t].double().softmax(dim=0)
        first = int(probs.argmax())
        second = int(probs.masked_fill(torch.arange(num_experts) == first, -1).argmax())
        g1, g2 = probs[first].item(), probs[second].item()
        tops.append((second, g2 / (g1 + g2)))
        if count[first] < capacity:
            gates[t, first] = g1 / (g1 + g2)
        count[first] += 1
    for t, (second, g2) in enumerate(tops):
        if 2 * g2 > uniform[t]:
            if count[second] < capacity:
                gates[t, second] = g2
            count[second] += 1
    return gates


@quick
@given(st.integers(2, 8), st.integers(0, 20), st.integers(1, 12), st.integers(0, 2**31))
def test_gshard_is_the_algorithm_of_the_paper(num_experts: int, tokens: int, capacity: int, seed: int) -> None:
    logits = torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed)) + torch.arange(num_experts)
    uniform = torch.rand(tokens, generator=torch.Generator().manual_seed(seed + 1)).tolist()
    choices = gshard(logits, capacity=capacity, generator=torch.Generator().manual_seed(seed + 1))
    expected = gshard_by_hand(logits, capacity, uniform)
    torch.testing.assert_close(choices.spread(num_experts).double(), expected, rtol=1e-5, atol=1e-7)


def test_the_second_expert_is_taken_with_twice_its_weight_as_probability() -> None:
    tokens = 20_000
    logits = torch.tensor([0.0, -1.0, -9.0]).expand(tokens, 3)
    share = 1 / (1 + math.e)  # of two, the second's weight
    choices = gshard(logits, generator=torch.Generator().manual_seed(0))
    taken = choices.is_expert_TK[:, 1]
    sigma = math.sqrt(2 * share * (1 - 2 * share) / tokens)
    assert float(taken.double().mean()) == pytest.approx(2 * share, abs=5 * sigma)
    assert choices.weights_TK[taken][0].tolist() == pytest.approx([1 - share, share])
    assert choices.weights_TK[~taken][0].tolist() == pytest.approx([1 - share, 0])
    assert gshard(logits[:5], normalize_kept=True).weights_TK.sum(dim=1).tolist() == pytest.approx([1.0] * 5)
