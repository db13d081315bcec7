"""The sampler against dumb oracles: noise in plain arithmetic, and vLLM's steps one probability at a time."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.engine.api import GenerateRequest, SamplingParams
from expertmesh.engine.noise import gumbel, least_bits_above, noise_bits
from expertmesh.engine.sampling import Choice, SamplingState, candidates, choose, choose_tokens

EOS = 1


def state_of(params: SamplingParams, prompt=(3, 4), generated=(), eos=(EOS,)) -> SamplingState:
    """The state of a request that has generated `generated`, token by token."""
    state = SamplingState(GenerateRequest(request_id="r", prompt_ids=tuple(prompt), sampling=params), eos)
    for token_id in generated:
        state.append(token_id)
    return state


# --- noise -----------------------------------------------------------------------------------------------------------


def noise_oracle(seed: int, position: int, vocab_size: int) -> list[float]:
    """Philox keyed by the seed, from the counter that has the position as its second word, in plain arithmetic."""
    generator = np.random.Philox(key=seed % 2**64, counter=position << 64)
    uniforms = [((generator.random_raw() >> 12) + 0.5) / 2**52 for _ in range(vocab_size)]
    return [-math.log(-math.log(uniform)) for uniform in uniforms]


@given(seed=st.integers(-(2**70), 2**70), position=st.integers(0, 2**31))
def test_noise_is_the_oracles(seed, position):
    np.testing.assert_allclose(gumbel(noise_bits(seed, position, 20)), noise_oracle(seed, position, 20), rtol=1e-12)


def test_noise_is_the_same_in_every_release():
    """A router of another version must go on with the tokens that this one would have drawn."""
    assert noise_bits(42, 7, 3).tolist() == [8305950373989433421, 5644400767158196621, 10229095922241509741]


def test_noise_of_an_id_does_not_depend_on_the_size_of_the_vocabulary():
    assert (noise_bits(5, 9, 1000)[:100] == noise_bits(5, 9, 100)).all()


@given(st.floats(-5, 40))
def test_bits_below_the_least_never_exceed_the_bound(bound):
    least = int(least_bits_above(bound))
    steps = [least - (step << 12) for step in (1, 2, 1000) if least >= step << 12]
    assert all(gumbel(np.array(steps, np.uint64)) <= bound)


def test_noise_differs_by_seed_and_position():
    drawn = [noise_bits(seed, position, 4).tobytes() for seed in range(50) for position in range(50)]
    assert len(set(drawn)) == len(drawn)


def test_noise_has_the_gumbel_distribution():
    drawn = np.concatenate([gumbel(noise_bits(0, position, 1000)) for position in range(200)])
    assert drawn.mean() == pytest.approx(0.5772, abs=0.01)
    assert drawn.var() == pytest.approx(math.pi**2 / 6, abs=0.03)


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_choices_are_as_frequent_as_their_probabilities(vary):
    logits_V = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0], np.float32)
    num_draws = 20_000
    counts = Counter()
    for draw in range(num_draws):
        state = state_of(SamplingParams(max_tokens=1, seed=draw if vary == "seed" else 42))
        state.position = draw if vary == "position" else 7
        counts[choose(logits_V, state)] += 1
    expected = num_draws * np.exp(logits_V) / np.exp(logits_V).sum()
    chi_square = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in range(8))
    assert chi_square < 24.3, "above the 99.9% quantile of 7 degrees of freedom"


# --- the steps -------------------------------------------------------------------------------------------------------


def scores_oracle(logits, params: SamplingParams, prompt, generated, stop_ids) -> list[float]:
    """Log-probabilities, up to a constant, of what is left to choose from: vLLM's steps, one token at a time."""
    scores = [float(logit) for logit in logits]
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if len(generated) < params.min_tokens:
        for token in stop_ids:
            scores[token] = -math.inf
    for token in set(prompt) | set(generated):
        scores[token] *= 1 / params.repetition_penalty if scores[token] > 0 else params.repetition_penalty
    for token in set(generated):
        scores[token] -= params.frequency_penalty * generated.count(token) + params.presence_penalty
    if params.temperature == 0:
        best = max(scores)
        return [0.0 if token == scores.index(best) else -math.inf for token in range(len(scores))]
    scores = [score / params.temperature for score in scores]

    def probabilities():
        weights = [math.exp(score - max(scores)) for score in scores]
        return [weight / sum(weights) for weight in weights]

    def keep(tokens):
        return [score if token in tokens else -math.inf for token, score in enumerate(scores)]

    likely = probabilities()
    scores = keep({token for token, p in enumerate(likely) if p >= params.min_p * max(likely)})
    by_rank = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    scores = keep(by_rank[: params.top_k] if params.top_k else by_rank)
    nucleus, mass = [], 0.0
    for token in by_rank:
        if nucleus and mass >= params.top_p:
            break
        nucleus.append(token)
        mass += probabilities()[token]
    return keep(nucleus)


VOCAB = 12
tokens = st.integers(0, VOCAB - 1)
# Quarters make ties common; the odd fractions keep thresholds away from sums of equal probabilities.
params_strategy = st.builds(
    SamplingParams,
    max_tokens=st.just(100),
    temperature=st.sampled_from([0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.0, 0.1234567, 0.4567891, 0.9012345, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    min_p=st.sampled_from([0.0, 0.0512345, 0.3123456]),
    seed=st.integers(0, 2**32),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 2.5]), max_size=3),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(tokens, max_size=2).map(tuple),
    ignore_eos=st.booleans(),
)


@settings(max_examples=500, deadline=None)
@given(
    params=params_strategy,
    quarters=st.lists(st.integers(-12, 12), min_size=VOCAB, max_size=VOCAB),
    prompt=st.lists(tokens, min_size=1, max_size=5),
    generated=st.lists(tokens, max_size=8),
)
def test_a_choice_is_the_oracles(params, quarters, prompt, generated):
    logits = np.array(quarters, np.float32) / 4
    stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    scores = scores_oracle(logits, params, prompt, generated, stop_ids)
    noise = noise_oracle(params.seed, len(prompt) + len(generated), VOCAB)
    perturbed = [score + extra for score, extra in zip(scores, noise, strict=True)]
    assert choose(logits, state_of(params, prompt, generated)) == perturbed.index(max(perturbed))


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0], ids=["flat", "even", "peaked"])
def test_a_nucleus_of_any_size_is_exact(spread):
    """Over a vocabulary larger than the sampler first sorts, with ties at every rank."""
    rng = np.random.default_rng(0)
    scores = np.repeat(rng.normal(scale=spread, size=5000), 2)
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-scores, kind="stable")
    for top_p in (0.1, 0.5003, 0.99):
        size = np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1
        kept = candidates(scores, SamplingParams(max_tokens=1, top_p=top_p))
        assert kept.tolist() == sorted(order[:size].tolist())


@pytest.mark.parametrize("logit_bias", [{}, {7: 0.0}], ids=["as they are", "adjusted"])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 30.0])
def test_sampling_a_large_vocabulary_is_exact(spread, logit_bias):
    """Over more tokens than the sampler works the noise out for, and by both ways to find those."""
    scores = (np.random.default_rng(0).normal(size=5000) * spread).astype(np.float32)
    for seed in range(100):
        perturbed = scores.astype(np.float64) + gumbel(noise_bits(seed, 2, 5000))
        params = SamplingParams(max_tokens=1, seed=seed, logit_bias=logit_bias)
        assert choose(scores, state_of(params)) == perturbed.argmax()


def test_equal_logits_go_to_the_lowest_id():
    logits = torch.tensor([[0.0, 3.0, 3.0, 3.0]])
    greedy = SamplingParams(max_tokens=1, temperature=0, top_logprobs=2)
    [choice] = choose_tokens(logits, [state_of(greedy)])
    assert (choice.token_id, [token for token, _ in choice.top_logprobs]) == (1, [1, 2])
    assert candidates(np.array([0.0, 3.0, 3.0, 3.0]), SamplingParams(max_tokens=1, top_k=2)).tolist() == [1, 2]


def test_a_resumed_request_stands_where_the_first_one_stood():
    params = SamplingParams(
        max_tokens=9, seed=3, frequency_penalty=0.7, presence_penalty=0.1, repetition_penalty=1.2, min_tokens=3
    )
    generated = (5, 6, 5, 2)
    rng = np.random.default_rng(0)
    for num_resumed in range(5):
        prompt = (3, 4, *generated[:num_resumed])
        request = GenerateRequest(request_id="r", prompt_ids=prompt, sampling=params, num_resumed=num_resumed)
        resumed, lived = SamplingState(request, (EOS,)), state_of(params, generated=generated[:num_resumed])
        for _ in range(20):
            logits = rng.normal(size=8).astype(np.float32)
            assert choose(logits, resumed) == choose(logits, lived)


# --- rows of a batch -------------------------------------------------------------------------------------------------


def random_rows(num_rows: int, vocab_size: int = 500) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 3


def test_a_row_is_chosen_alike_alone_and_in_any_batch():
    variants = [
        SamplingParams(max_tokens=9, temperature=0),
        SamplingParams(max_tokens=9, temperature=0, repetition_penalty=1.5, top_logprobs=3),
        SamplingParams(max_tokens=9, seed=1),
        SamplingParams(max_tokens=9, seed=1, top_k=20, top_p=0.8, top_logprobs=0),
    ]
    logits = random_rows(16)
    states = [state_of(variants[row % 4], prompt=range(2, 3 + row)) for row in range(16)]
    together = choose_tokens(logits, states)
    assert together[::-1] == choose_tokens(logits.flip(0), states[::-1])
    assert together == [choose_tokens(logits[row : row + 1], [states[row]])[0] for row in range(16)]


def test_logprobs_are_the_models_whatever_the_parameters():
    logits = random_rows(2)
    params = SamplingParams(max_tokens=9, temperature=0.5, top_k=3, logit_bias={7: 50.0}, top_logprobs=5)
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, choice in enumerate(choose_tokens(logits, [state_of(params)] * 2)):
        assert choice.token_id == 7, "the bias decides the choice"
        assert choice.logprob == pytest.approx(expected[row, 7].item(), abs=1e-5), "but not the log-probability"
        assert [token for token, _ in choice.top_logprobs] == expected[row].topk(5).indices.tolist()
        for token, logprob in choice.top_logprobs:
            assert logprob == pytest.approx(expected[row, token].item(), abs=1e-5)


def test_the_chosen_tokens_logprob_is_the_identical_float_in_the_top():
    params = SamplingParams(max_tokens=9, temperature=0, top_logprobs=1)
    for choice in choose_tokens(random_rows(8), [state_of(params)] * 8):
        assert choice.top_logprobs == ((choice.token_id, choice.logprob),)


def test_logprobs_are_only_reported_when_asked_for():
    silent, chosen_only = SamplingParams(max_tokens=1), SamplingParams(max_tokens=1, top_logprobs=0)
    first, second = choose_tokens(random_rows(2), [state_of(silent), state_of(chosen_only)])
    assert first.logprob is None
    assert second.logprob is not None
    assert first.top_logprobs == second.top_logprobs == ()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_that_is_not_finite_is_reported_and_spares_the_others(broken, temperature):
    logits = random_rows(3)
    logits[1, 100] = broken
    params = SamplingParams(max_tokens=1, temperature=temperature)
    first, second, third = choose_tokens(logits, [state_of(params)] * 3)
    assert second is None
    assert isinstance(first, Choice)
    assert isinstance(third, Choice)


def test_logits_that_the_model_forbids_are_never_chosen():
    logits = torch.full((1, 50), -math.inf)
    logits[0, [3, 9]] = 0.0
    chosen = {choose_tokens(logits, [state_of(SamplingParams(max_tokens=1, seed=s))])[0].token_id for s in range(50)}
    assert chosen == {3, 9}
