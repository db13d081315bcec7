"""Balancing terms and measures against closed forms and plain loops, and every gradient against finite differences."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.gates import balancing, measures
from expertmesh.gates.capacity import expert_choice, gshard, switch
from expertmesh.gates.choices import NO_EXPERT, Choices, best_k, count_tokens
from expertmesh.gates.hashing import hash_gate
from expertmesh.gates.select import (
    dense,
    noise_width,
    noisy_logits,
    noisy_topk,
    scored_topk,
    sigmoid_topk,
    softmax_topk,
    sqrt_softplus_topk,
    top_p,
    topk_softmax,
)

quick = settings(deadline=None, max_examples=30)
SIZES = [(1, 2, 1), (9, 4, 2), (30, 7, 3), (5, 6, 6)]


def spaced(tokens: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    """Logits in float64, none near another of its row or column: small steps change no choice."""
    order = torch.randperm(tokens * num_experts, generator=torch.Generator().manual_seed(seed)).double()
    return ((order - order.mean()) * 4 / len(order)).view(tokens, num_experts)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


# --- gradients -------------------------------------------------------------------------------------------------------

GATES = {
    "softmax-topk": lambda logits: softmax_topk(logits, 2),
    "softmax-topk, normalized": lambda logits: softmax_topk(logits, 2, normalize=True),
    "topk-softmax": lambda logits: topk_softmax(logits, 2),
    "sigmoid-topk": lambda logits: sigmoid_topk(logits, 2, normalize=True, scale=2.5),
    "sqrt-softplus-topk": lambda logits: sqrt_softplus_topk(logits, 2),
    "switch": lambda logits: switch(logits, capacity=2),
    "gshard": lambda logits: gshard(logits, capacity=3, overflow="next-best"),
    "gshard, kept": lambda logits: gshard(logits, capacity=3, normalize_kept=True, generator=rng()),
    "noisy-topk": lambda logits: noisy_topk(logits, -logits, 2, generator=rng()),
    "top-p": lambda logits: top_p(logits, 0.7),
    "expert-choice": lambda logits: expert_choice(logits, 2),
    "dense": dense,
}


@pytest.mark.parametrize("name", GATES)
def test_a_gates_weights_have_the_gradient_they_should(name: str) -> None:
    logits = spaced(6, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: GATES[name](x).weights_TK, logits)


def test_a_hash_gate_has_nothing_to_learn_but_a_scored_one_has() -> None:
    scores = spaced(6, 4).sigmoid().requires_grad_()
    table, ids = torch.tensor([[0, 2], [3, 1]]), torch.tensor([0, 1, 1, 0, 1, 0])
    assert not hash_gate(ids, table).weights_TK.requires_grad
    assert torch.autograd.gradcheck(lambda x: hash_gate(ids, table, scores_TE=x, normalize=True).weights_TK, scores)


LOSSES = {
    "switch": lambda logits: balancing.switch_loss(logits.softmax(dim=1), best_k(logits, 2)),
    "gshard": lambda logits: balancing.gshard_loss(logits.softmax(dim=1), best_k(logits, 2)),
    "importance": lambda logits: balancing.importance_loss(softmax_topk(logits, 2), logits.shape[1]),
    "z": balancing.z_loss,
    "sequence": lambda logits: balancing.sequence_loss(logits.sigmoid(), best_k(logits, 2), torch.arange(6) % 2),
    "entropy": lambda logits: balancing.entropy_loss(logits.softmax(dim=1)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_gradient_it_should(name: str) -> None:
    assert torch.autograd.gradcheck(LOSSES[name], spaced(6, 4).requires_grad_())


def test_the_load_loss_has_gradients_for_the_gate_and_for_its_noise() -> None:
    def loss(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return balancing.load_loss(logits, noise, noisy_logits(logits, noise, generator=rng()), 2)

    assert torch.autograd.gradcheck(loss, (spaced(6, 4).requires_grad_(), spaced(6, 4, seed=1).requires_grad_()))


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts", [2, 5, 16])
def test_losses_of_even_and_of_collapsed_gates_are_the_closed_forms(num_experts: int) -> None:
    tokens = 3 * num_experts
    even = torch.full((tokens, num_experts), 1 / num_experts, dtype=torch.float64)
    in_turn = (torch.arange(tokens) % num_experts).unsqueeze(1)
    one = torch.zeros(tokens, 1, dtype=torch.int64)
    sure = torch.nn.functional.one_hot(one[:, 0], num_experts).double()
    sequences = torch.arange(tokens) // num_experts
    ones = torch.ones(tokens, 1, dtype=torch.float64)

    def importance(index: torch.Tensor) -> float:
        return balancing.importance_loss(Choices(index_TK=index, weights_TK=ones), num_experts).item()

    assert balancing.switch_loss(even, in_turn).item() == pytest.approx(1)
    assert balancing.switch_loss(sure, one).item() == pytest.approx(num_experts)
    assert balancing.gshard_loss(even, in_turn).item() == pytest.approx(1 / num_experts**2)
    assert balancing.gshard_loss(sure, one).item() == pytest.approx(1 / num_experts)
    assert balancing.sequence_loss(even, in_turn, sequences).item() == pytest.approx(1)
    assert balancing.sequence_loss(sure, one, sequences).item() == pytest.approx(num_experts)
    assert importance(in_turn) == pytest.approx(0)
    assert importance(one) == pytest.approx(num_experts - 1)
    assert balancing.z_loss(even.log()).item() == pytest.approx(0)
    assert balancing.z_loss(torch.cat([even.log() + 3, even.log() - 1])).item() == pytest.approx((9 + 1) / 2)
    assert balancing.entropy_loss(even).item() == pytest.approx(math.log(num_experts))
    assert balancing.entropy_loss(sure).item() == 0


@pytest.mark.parametrize(("tokens", "num_experts", "k"), SIZES)
def test_losses_are_the_sums_of_their_papers(tokens: int, num_experts: int, k: int) -> None:
    logits = spaced(tokens, num_experts)
    probs, index = logits.softmax(dim=1), best_k(logits, k)
    index[0, -1] = NO_EXPERT if k > 1 else index[0, -1]
    rows, chosen = probs.tolist(), index.tolist()
    pairs = [expert for row in chosen for expert in row if expert != NO_EXPERT]
    mean_prob = [sum(row[e] for row in rows) / tokens for e in range(num_experts)]

    by_hand = num_experts * sum(pairs.count(e) / len(pairs) * mean_prob[e] for e in range(num_experts))
    assert balancing.switch_loss(probs, index).item() == pytest.approx(by_hand)
    firsts = [row[0] for row in chosen]
    by_hand = sum(firsts.count(e) / tokens * mean_prob[e] for e in range(num_experts)) / num_experts
    assert balancing.gshard_loss(probs, best_k(logits, k)).item() == pytest.approx(by_hand)

    importance = [sum(row[e] for row, own in zip(rows, chosen, strict=True) if e in own) for e in range(num_experts)]
    by_hand = scipy.stats.variation(importance) ** 2
    weights = probs.gather(1, index.clamp(min=0)).masked_fill(index == NO_EXPERT, 0)
    mine = balancing.importance_loss(Choices(index_TK=index, weights_TK=weights), num_experts)
    assert mine.item() == pytest.approx(by_hand)


@pytest.mark.parametrize(("tokens", "num_experts", "k"), SIZES)
def test_the_sequence_loss_is_the_switch_loss_of_each_sequence(tokens: int, num_experts: int, k: int) -> None:
    scores = spaced(tokens, num_experts).sigmoid()
    index = best_k(scores, k)
    sequence = torch.arange(tokens) * 3 // max(tokens, 3)
    of_each = []
    for one in range(int(sequence.max()) + 1):
        mine = scores[sequence == one]
        share = mine / mine.sum(dim=1, keepdim=True)
        # Equations 18 and 20, with the paper's names.
        f = [num_experts / (k * len(mine)) * (index[sequence == one] == e).sum().item() for e in range(num_experts)]
        of_each.append(sum(f[e] * share[:, e].mean().item() for e in range(num_experts)))
    expected = sum(of_each) / len(of_each)
    assert balancing.sequence_loss(scores, index, sequence).item() == pytest.approx(expected)


@pytest.mark.parametrize(("tokens", "num_experts", "k"), SIZES)
def test_load_probability_is_the_normal_tail_above_the_kth_best_of_the_others(
    tokens: int, num_experts: int, k: int
) -> None:
    logits, noise = spaced(tokens, num_experts), spaced(tokens, num_experts, seed=1)
    noisy = noisy_logits(logits, noise, generator=rng())
    mine = balancing.load_probability(logits, noise, noisy, k)
    for t in range(tokens):
        for e in range(num_experts):
            others = sorted((noisy[t, i].item() for i in range(num_experts) if i != e), reverse=True)
            if k == num_experts:
                assert mine[t, e] == 1
                continue
            z = (logits[t, e].item() - others[k - 1]) / math.log1p(math.exp(noise[t, e].item()))
            assert mine[t, e].item() == pytest.approx(scipy.stats.norm.cdf(z))


def test_load_probability_is_how_often_an_expert_is_chosen_when_its_noise_is_drawn_anew() -> None:
    logits, noise = spaced(1, 5).expand(50_000, 5), torch.zeros(50_000, 5, dtype=torch.float64)
    noisy = noisy_logits(logits[:1], noise[:1], generator=rng()).expand(50_000, 5)
    probability = balancing.load_probability(logits[:1], noise[:1], noisy[:1], 2)[0]
    for expert in range(5):
        drawn = noisy.clone()
        normal = torch.randn(50_000, generator=rng(), dtype=torch.float64)
        drawn[:, expert] = logits[:, expert] + normal * noise_width(noise)[:, expert]
        share = (best_k(drawn, 2) == expert).any(dim=1).double().mean()
        assert share.item() == pytest.approx(probability[expert].item(), abs=0.012)


def test_updating_the_bias_evens_the_load_of_a_skewed_gate_and_leaves_weights_alone() -> None:
    logits = torch.randn(400, 8, generator=rng()) + torch.linspace(0, 3, 8)
    scores, bias = logits.sigmoid(), torch.zeros(8)
    before = measures.balancedness(count_tokens(scored_topk(scores, 2).index_TK, 8))
    for _ in range(300):
        choices = scored_topk(scores, 2, bias_E=bias)
        tokens = count_tokens(choices.index_TK, 8)
        step = [0.001 * ((n < 100) - (n > 100)) for n in tokens.tolist()]
        expected = bias + torch.tensor(step)
        bias = balancing.update_bias(bias, tokens, 0.001)
        torch.testing.assert_close(bias, expected)
    assert before < 0.5
    assert measures.balancedness(count_tokens(scored_topk(scores, 2, bias_E=bias).index_TK, 8)) > 0.9
    assert torch.equal(choices.weights_TK, scores.gather(1, choices.index_TK))


# --- measures --------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(0, 50), min_size=2, max_size=20).filter(any))
def test_measures_of_load_are_the_textbooks(tokens: list[int]) -> None:
    load = torch.tensor(tokens)
    even = sum(tokens) / len(tokens)
    assert measures.balancedness(load) == pytest.approx(even / max(tokens))
    assert measures.variation(load) == pytest.approx(scipy.stats.variation(tokens), abs=1e-12)
    assert measures.load_entropy(load) == pytest.approx(scipy.stats.entropy(tokens, base=len(tokens)), abs=1e-12)
    assert measures.is_dead(load).tolist() == [n == 0 for n in tokens]
    assert measures.is_dead(load, share=0.5).tolist() == [n <= 0.5 * even for n in tokens]


@pytest.mark.parametrize("num_experts", [1, 2, 9])
def test_even_load_and_no_load_count_as_even_and_one_busy_expert_as_worst(num_experts: int) -> None:
    for load in (torch.zeros(num_experts, dtype=torch.int64), torch.full((num_experts,), 7)):
        assert measures.balancedness(load) == 1
        assert measures.variation(load) == 0
        assert measures.load_entropy(load) == pytest.approx(1)
    if num_experts > 1:
        load = 5 * (torch.arange(num_experts) == 1)
        assert measures.balancedness(load) == pytest.approx(1 / num_experts)
        assert measures.variation(load) == pytest.approx(math.sqrt(num_experts - 1))
        assert measures.load_entropy(load) == 0
        assert measures.gate_entropy(torch.full((3, num_experts), 1 / num_experts)) == pytest.approx(1)
        assert measures.gate_entropy(torch.eye(num_experts)) == 0


@quick
@given(st.lists(st.lists(st.integers(-1, 6), min_size=3, max_size=3), min_size=2, max_size=30))
def test_overlap_is_what_neighbours_share(rows: list[list[int]]) -> None:
    sets = [sorted({expert for expert in row if expert >= 0}) for row in rows]
    index = torch.tensor([own + [NO_EXPERT] * (3 - len(own)) for own in sets])
    shared = sum(len(set(before) & set(after)) for before, after in pairwise(sets))
    total = sum(len(after) for after in sets[1:])
    mine = measures.overlap(index)
    assert mine == pytest.approx(shared / total) if total else math.isnan(mine)


def test_overlap_of_random_choices_is_k_over_e() -> None:
    index = best_k(torch.rand(20_000, 8, generator=rng()), 2)
    assert measures.overlap(index) == pytest.approx(2 / 8, abs=0.01)
    assert measures.overlap(index[:1].expand(9, 2)) == 1


def test_dropped_choices_and_tokens_are_counted() -> None:
    def choices(*rows: list[int]) -> Choices:
        index = torch.tensor(rows)
        return Choices(index_TK=index, weights_TK=(index != NO_EXPERT).float())

    wanted = choices([0, 1], [0, 2], [0, NO_EXPERT], [3, 1])
    kept = choices([0, 1], [NO_EXPERT, 2], [NO_EXPERT, NO_EXPERT], [3, NO_EXPERT])
    assert measures.dropped_choices(wanted, kept) == pytest.approx(3 / 7)
    assert measures.dropped_choices(wanted, wanted) == 0
    assert measures.dropped_tokens(kept) == 1 / 4
    assert measures.dropped_tokens(wanted) == 0
    empty = Choices(index_TK=torch.zeros(0, 2, dtype=torch.int64), weights_TK=torch.zeros(0, 2))
    assert measures.dropped_choices(empty, empty) == measures.dropped_tokens(empty) == 0
