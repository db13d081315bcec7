"""Gates against plain loops over tokens and experts, on random logits with and without ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.gates.capacity import expert_choice
from expertmesh.gates.choices import NO_EXPERT, Choices, count_tokens
from expertmesh.gates.hashing import balanced_table, hash_gate, random_table
from expertmesh.gates.route import GATES, GateInput, route
from expertmesh.gates.select import (
    dense,
    noisy_logits,
    noisy_topk,
    scored_topk,
    sigmoid_topk,
    softmax_topk,
    sqrt_softplus_topk,
    threshold,
    top_p,
    topk_softmax,
)
from expertmesh.gates.spec import GateSpec, Groups
from expertmesh.gates.strategies import STRATEGIES
from expertmesh.ids import ExpertId, HostId
from expertmesh.moe.dispatch import make_dispatch_plan
from expertmesh.moe.layer import combine
from expertmesh.placement import HostInfo, Placement

quick = settings(deadline=None, max_examples=40)


@st.composite
def logits_of(draw, num_experts: int | None = None) -> torch.Tensor:
    """Random logits; rounded they are full of ties."""
    tokens = draw(st.integers(0, 20))
    num_experts = num_experts or draw(st.integers(1, 12))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = draw(st.sampled_from([0.3, 2.0, 8.0])) * torch.randn(tokens, num_experts, generator=rng)
    return logits.round() if draw(st.booleans()) else logits


def ranked(scores: list[float]) -> list[int]:
    """Experts, best first, of equal ones the lower index."""
    return sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))


SPECS = {
    "softmax-topk": {"k": 2, "normalize": True},
    "topk-softmax": {"k": 3},
    "sigmoid-topk": {"k": 2, "num_groups": 4, "groups_kept": 2, "group_score": "top2", "scale": 2.5},
    "sqrt-softplus-topk": {"k": 2},
    "switch": {"capacity_factor": 1.0},
    "gshard": {"capacity_factor": 1.25, "overflow": "next-best", "random_second": True},
    "noisy-topk": {"k": 2},
    "hash": {"k": 2},
    "top-p": {"top_p": 0.6, "k": 5, "normalize": True},
    "threshold": {"ratio": 0.5, "k": 3, "normalize": True},
    "expert-choice": {"capacity_factor": 2.0},
    "dense": {},
}
WIDTH = {"softmax-topk": 2, "topk-softmax": 3, "sigmoid-topk": 2, "sqrt-softplus-topk": 2, "switch": 1, "gshard": 2}
WIDTH |= {"noisy-topk": 2, "hash": 2, "top-p": 5, "threshold": 3, "expert-choice": 8, "dense": 8}
eight_experts = logits_of(8)


def routed(name: str, logits: torch.Tensor, *, seed: int | None = 0) -> Choices:
    """A strategy of SPECS by its name, with all that any of them needs."""
    ids = (logits.float().sum(dim=1) * 100).long().abs() % 30
    given = GateInput(
        logits_TE=logits,
        noise_TE=logits.sin(),
        token_T=ids,
        table_VK=random_table(30, 8, 2, generator=torch.Generator().manual_seed(3)),
        bias_E=torch.linspace(-0.1, 0.1, 8) if "num_groups" in STRATEGIES[name].takes else None,
    )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return route(GateSpec(strategy=name, num_experts=8, **SPECS[name]), given, generator=generator)


def test_every_strategy_has_a_gate_and_is_tested() -> None:
    assert set(GATES) == set(STRATEGIES) == set(SPECS) == set(WIDTH)


@pytest.mark.parametrize("name", STRATEGIES)
@settings(deadline=None, max_examples=15)
@given(logits=eight_experts)
def test_what_a_gate_returns_fits_the_exchange(name: str, logits: torch.Tensor) -> None:
    choices = routed(name, logits)
    index, weights = choices.index_TK, choices.weights_TK
    assert index.shape == weights.shape == (len(logits), WIDTH[name])
    assert index.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert ((index >= NO_EXPERT) & (index < 8)).all()
    assert (weights[index == NO_EXPERT] == 0).all()
    assert (weights >= 0).all()
    for row in index.tolist():
        chosen = [expert for expert in row if expert != NO_EXPERT]
        assert len(chosen) == len(set(chosen))
    assert torch.equal(routed(name, logits).index_TK, index)


@pytest.mark.parametrize("name", [name for name, strategy in STRATEGIES.items() if strategy.is_alone])
@settings(deadline=None, max_examples=15)
@given(logits=eight_experts, data=st.data())
def test_alone_a_token_gets_to_the_bit_what_it_gets_in_a_batch(name: str, logits: torch.Tensor, data) -> None:
    together = routed(name, logits, seed=None)
    some = data.draw(st.permutations(range(len(logits))))[: data.draw(st.integers(0, len(logits)))]
    apart = routed(name, logits[some].clone(), seed=None)
    assert torch.equal(apart.index_TK, together.index_TK[some])
    assert torch.equal(apart.weights_TK, together.weights_TK[some])


def test_gates_compute_in_float32_for_half_precision_logits() -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in STRATEGIES:
        ours = routed(name, logits)
        assert ours.weights_TK.dtype == torch.float32
        assert torch.equal(ours.index_TK, routed(name, logits.float()).index_TK)


@quick
@given(logits=logits_of(), data=st.data())
def test_topk_takes_the_best_and_weighs_them_by_score(logits: torch.Tensor, data) -> None:
    num_experts = logits.shape[1]
    k = data.draw(st.integers(1, num_experts))
    normalize, scale = data.draw(st.booleans()), data.draw(st.sampled_from([1.0, 2.5]))
    probs = logits.double().softmax(dim=1).tolist()
    sigmoids = logits.double().sigmoid().tolist()
    roots = [[math.sqrt(math.log1p(math.exp(x))) for x in row] for row in logits.double().tolist()]
    options = {"normalize": normalize, "scale": scale}
    for gate, rows in ((softmax_topk, probs), (sigmoid_topk, sigmoids), (sqrt_softplus_topk, roots)):
        choices = gate(logits, k, **options)
        for t, scores in enumerate(rows):
            best = ranked(logits[t].tolist())[:k]
            total = sum(scores[e] for e in best) if normalize else 1.0
            # Scores that differ in theory may be equal in float32, where sigmoid saturates.
            if gate is softmax_topk:
                assert choices.index_TK[t].tolist() == best
            assert choices.weights_TK[t].tolist() == pytest.approx([scale * scores[e] / total for e in best], rel=1e-4)
        if normalize:
            torch.testing.assert_close(choices.weights_TK.sum(dim=1), torch.full((len(logits),), scale))


@quick
@given(logits=logits_of(), data=st.data())
def test_softmax_over_the_best_is_the_best_of_softmax_normalized(logits: torch.Tensor, data) -> None:
    k = data.draw(st.integers(1, logits.shape[1]))
    after, before = topk_softmax(logits, k), softmax_topk(logits, k, normalize=True)
    assert torch.equal(after.index_TK, before.index_TK)
    torch.testing.assert_close(after.weights_TK, before.weights_TK)


def test_of_equal_experts_the_lower_index_is_chosen() -> None:
    for num_experts in (8, 64, 300):
        assert topk_softmax(torch.zeros(3, num_experts), 5).index_TK.tolist() == [[0, 1, 2, 3, 4]] * 3


@quick
@given(data=st.data(), num_groups=st.integers(1, 5), size=st.integers(2, 4), score=st.sampled_from(["max", "top2"]))
def test_groups_and_bias_steer_the_selection_only(data, num_groups: int, size: int, score: str) -> None:
    logits = data.draw(logits_of(num_groups * size))
    kept = data.draw(st.integers(1, num_groups))
    k = data.draw(st.integers(1, kept * size))
    bias = data.draw(st.sampled_from([None, torch.linspace(0.5, -0.5, num_groups * size)]))
    scores = logits.sigmoid()
    choices = scored_topk(scores, k, bias_E=bias, groups=Groups(num=num_groups, kept=kept, score=score))
    for t, row in enumerate((scores if bias is None else scores + bias).tolist()):
        groups = [row[g * size : (g + 1) * size] for g in range(num_groups)]
        # In float32, so that ties are the same ones.
        worth = [float(np.float32(sum(sorted(group)[-2:]) if score == "top2" else max(group))) for group in groups]
        allowed = {g * size + i for g in ranked(worth)[:kept] for i in range(size)}
        best = [expert for expert in ranked(row) if expert in allowed][:k]
        assert choices.index_TK[t].tolist() == best
        assert choices.weights_TK[t].tolist() == scores[t, best].tolist()


@pytest.mark.parametrize("num_experts", [3, 8, 12, 60, 64])
@pytest.mark.parametrize("gate", [softmax_topk, sigmoid_topk, sqrt_softplus_topk, topk_softmax])
def test_scores_are_the_same_to_the_bit_at_the_end_of_an_array(gate, num_experts: int) -> None:
    """Where vector instructions run out, in batches of odd sizes."""
    logits = 3 * torch.randn(37, num_experts, generator=torch.Generator().manual_seed(num_experts))
    together = gate(logits, 3)
    for size in (1, 2, 5, 36):
        apart = [gate(part.clone(), 3) for part in logits.split(size)]
        assert torch.equal(torch.cat([some.weights_TK for some in apart]), together.weights_TK)
        assert torch.equal(torch.cat([some.index_TK for some in apart]), together.index_TK)


def test_scores_far_from_zero_are_what_they_should_be() -> None:
    logits = torch.tensor([[-200.0, -50, -20, -1, 0, 1, 20, 200]])
    sigmoid, root = sigmoid_topk(logits, 8).spread(8)[0], sqrt_softplus_topk(logits, 8).spread(8)[0]
    for x, s, r in zip(logits[0].tolist(), sigmoid.tolist(), root.tolist(), strict=True):
        assert s == pytest.approx(math.exp(-math.log1p(math.exp(-x))), rel=1e-6, abs=1e-30)
        assert r == pytest.approx(math.sqrt(max(x, 0) + math.log1p(math.exp(-abs(x)))), rel=1e-6, abs=1e-7)


@quick
@given(logits=logits_of(), p=st.floats(0.01, 1.0), data=st.data())
def test_top_p_takes_the_fewest_experts_that_reach_p(logits: torch.Tensor, p: float, data) -> None:
    num_experts = logits.shape[1]
    most = data.draw(st.none() | st.integers(1, num_experts))
    choices, summed = top_p(logits, p, k=most), top_p(logits, p, k=most, normalize=True, scale=2.5)
    assert torch.equal(choices.index_TK, summed.index_TK)
    torch.testing.assert_close(summed.weights_TK.sum(dim=1), torch.full((len(logits),), 2.5))
    probs = logits.softmax(dim=1)
    for t in range(len(logits)):
        chosen = choices.index_TK[t][choices.is_expert_TK[t]].tolist()
        best = ranked(probs[t].tolist())
        assert chosen == best[: len(chosen)]
        assert choices.weights_TK[t, : len(chosen)].tolist() == probs[t, chosen].tolist()
        reached = probs[t, chosen].double().sum().item()
        assert reached > p - 1e-6 or len(chosen) == (most or num_experts)
        assert reached - probs[t, chosen[-1]].item() < p + 1e-6


@quick
@given(logits=logits_of(), ratio=st.floats(0.05, 1.0), data=st.data())
def test_threshold_keeps_of_the_best_those_that_are_not_far_behind(logits: torch.Tensor, ratio: float, data) -> None:
    most = data.draw(st.integers(1, logits.shape[1]))
    choices, summed = threshold(logits, ratio, most), threshold(logits, ratio, most, normalize=True, scale=2.5)
    for token, row in enumerate(logits.softmax(-1).tolist()):
        kept = choices.index_TK[token][choices.is_expert_TK[token]].tolist()
        best = ranked(row)[:most]
        assert kept == best[: len(kept)]
        assert row[kept[-1]] > ratio * row[best[0]] * (1 - 1e-6)
        assert len(kept) == most or row[best[len(kept)]] < ratio * row[best[0]] * (1 + 1e-6)
        weights = [row[expert] for expert in kept] + [0.0] * (most - len(kept))
        assert choices.weights_TK[token].tolist() == weights
        expected = [2.5 * weight / sum(weights) for weight in weights]
        assert summed.weights_TK[token].tolist() == pytest.approx(expected, rel=1e-5)


def test_top_p_spends_one_expert_on_a_sure_token_and_all_on_an_unsure_one() -> None:
    logits = torch.tensor([[9.0, 0, 0, 0], [1, 1, 1, 1], [5, 5, 0, 0]])
    assert top_p(logits, 0.9).is_expert_TK.sum(dim=1).tolist() == [1, 4, 2]
    assert top_p(logits, 0.9, k=2).is_expert_TK.sum(dim=1).tolist() == [1, 2, 2]


@quick
@given(logits=logits_of(), capacity=st.integers(1, 25))
def test_in_expert_choice_each_expert_takes_its_best_tokens(logits: torch.Tensor, capacity: int) -> None:
    choices = expert_choice(logits, capacity)
    probs = logits.softmax(dim=1)
    taken = min(capacity, len(logits))
    assert count_tokens(choices.index_TK, logits.shape[1]).tolist() == [taken] * logits.shape[1]
    expected = torch.zeros_like(probs)
    for expert in range(logits.shape[1]):
        for token in ranked(probs[:, expert].tolist())[:capacity]:
            expected[token, expert] = probs[token, expert]
    assert torch.equal(choices.spread(logits.shape[1]), expected)
    for weights in choices.weights_TK.tolist():
        assert weights == sorted(weights, reverse=True)


@quick
@given(logits=logits_of())
def test_dense_is_softmax(logits: torch.Tensor) -> None:
    assert torch.equal(dense(logits).spread(logits.shape[1]), logits.softmax(dim=1))


@quick
@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 99), st.data())
def test_a_random_hash_gives_each_id_different_experts(num_experts: int, vocab: int, seed: int, data) -> None:
    k = data.draw(st.integers(1, num_experts))
    table = random_table(vocab, num_experts, k, generator=torch.Generator().manual_seed(seed))
    assert table.shape == (vocab, k)
    assert all(len(set(row)) == k and set(row) <= set(range(num_experts)) for row in table.tolist())
    tokens = torch.arange(vocab).flip(0)
    choices = hash_gate(tokens, table)
    assert torch.equal(choices.index_TK, table.flip(0))
    torch.testing.assert_close(choices.weights_TK.sum(dim=1), torch.ones(vocab))


def test_a_random_hash_uses_all_sets_of_experts_alike() -> None:
    table = random_table(60_000, 4, 2, generator=torch.Generator().manual_seed(0))
    pairs = torch.bincount(table[:, 0] * 4 + table[:, 1], minlength=16).view(4, 4)
    assert pairs.diagonal().tolist() == [0] * 4
    off = pairs[~torch.eye(4, dtype=torch.bool)].double()
    assert (off - 5000).abs().max() < 5 * math.sqrt(5000)


@quick
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 8))
def test_a_balanced_hash_is_as_even_as_its_most_frequent_id_allows(counts: list[int], num_experts: int) -> None:
    table = balanced_table(torch.tensor(counts), num_experts)
    load = [0] * num_experts
    for token_id, (expert,) in enumerate(table.tolist()):
        load[expert] += counts[token_id]
    assert sum(load) == sum(counts)
    assert max(load) - min(load) <= max(counts)


def test_noise_is_normal_and_as_wide_as_the_softplus_says() -> None:
    clean, noise = torch.zeros(40_000, 3), torch.tensor([-1.0, 0.0, 2.0]).expand(40_000, 3)
    noisy = noisy_logits(clean, noise, generator=torch.Generator().manual_seed(0))
    widths = [math.log1p(math.exp(x)) for x in (-1.0, 0.0, 2.0)]
    assert noisy.std(dim=0).tolist() == pytest.approx(widths, rel=0.02)
    assert noisy.mean(dim=0).abs().max() < 0.05
    shares = [float((noisy[:, i].abs() < width).double().mean()) for i, width in enumerate(widths)]
    assert shares == pytest.approx([0.6827] * 3, abs=0.01)


@quick
@given(logits=logits_of(), seed=st.integers(0, 99))
def test_noisy_topk_without_noise_is_topk_and_with_it_is_the_seeds(logits: torch.Tensor, seed: int) -> None:
    assert torch.equal(noisy_topk(logits, logits, 1).index_TK, topk_softmax(logits, 1).index_TK)
    once, again = (noisy_topk(logits, logits, 1, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(once.index_TK, again.index_TK)


@pytest.mark.parametrize("name", STRATEGIES)
@settings(deadline=None, max_examples=15)
@given(logits=eight_experts)
def test_trimmed_choices_say_the_same(name: str, logits: torch.Tensor) -> None:
    choices = routed(name, logits)
    trimmed = choices.trimmed()
    used = choices.is_expert_TK.sum(dim=1)
    assert trimmed.index_TK.shape[1] == max([1, *used.tolist()])
    assert torch.equal(trimmed.spread(8), choices.spread(8))
    for before, after in zip(choices.index_TK.tolist(), trimmed.index_TK.tolist(), strict=True):
        kept = [expert for expert in before if expert != NO_EXPERT]
        assert after[: len(kept)] == kept
        assert set(after[len(kept) :]) <= {NO_EXPERT}


def chosen_by_hand(choices: Choices) -> list[tuple[int, int]]:
    """Every (token, expert) of the choices, in order."""
    rows = enumerate(choices.index_TK.tolist())
    return sorted((token, expert) for token, row in rows for expert in row if expert != NO_EXPERT)


HOSTS = tuple(HostInfo(id=HostId(f"h{i}"), address="") for i in range(3))
PLACEMENT = Placement(
    epoch=1, hosts=HOSTS, num_experts=(8,), replicas={ExpertId(0, e): (HOSTS[e % 3].id,) for e in range(8)}
)


@pytest.mark.parametrize("name", STRATEGIES)
@settings(deadline=None, max_examples=15)
@given(logits=eight_experts)
def test_every_kept_token_reaches_exactly_its_experts(name: str, logits: torch.Tensor) -> None:
    """Through the dispatch plan and the combined sum, as a layer is served, against a sum over all experts."""
    choices = routed(name, logits)
    tokens, k = choices.index_TK.shape
    x = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(1))
    expert_P = choices.index_TK.flatten().numpy()
    rows = torch.zeros(tokens * k, 5)
    computed: list[tuple[int, int]] = []
    wanted = np.flatnonzero(expert_P != NO_EXPERT)
    for part in make_dispatch_plan(PLACEMENT, 0, expert_P, k, wanted) if len(wanted) else []:
        pairs = np.split(part.pairs, np.cumsum(part.counts)[:-1])
        for expert, mine in zip(part.experts, pairs, strict=True):
            rows[mine] = x[mine // k] * (expert + 1)
            computed += [(int(pair) // k, expert) for pair in mine]
    gates = choices.spread(8)
    assert sorted(computed) == chosen_by_hand(choices)
    expected = (gates * torch.arange(1.0, 9)).sum(dim=1, keepdim=True) * x
    torch.testing.assert_close(combine(rows.view(tokens, k, 5), choices.weights_TK), expected)
