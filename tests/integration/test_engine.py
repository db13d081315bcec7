"""What both engines write, against `generate` and plain forwards of the same models."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

from tests.integration.engines import (
    DEADLINE_S,
    EOS,
    ForwardHook,
    Inbox,
    both_kinds,
    generate,
    random_prompts,
    request,
    run,
    running,
    tiny,
)


@pytest.fixture(autouse=True)
def quiet_transformers():
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("qwen3_moe")


# --- what is generated -----------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "gpt_oss"])
def test_greedy_requests_of_unlike_lengths_write_what_generate_writes(model_type, kind):
    """Prompts longer than a step's tokens are split; sliding windows, attention sinks and early ends are among them."""
    model = tiny(model_type)
    prompts = random_prompts(1, 5, 19, 5, 40, 33, 5, 19, 2, 60)
    lengths = [12, 3, 30, 20, 1, 7, 2, 30, 9, 14]
    requests = [
        request(str(index), prompt, max_tokens=length)
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    with running(model, kind) as engine:
        inbox = run(engine, requests)
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        assert inbox.tokens(str(index)) == generate(model, prompt, length)


@pytest.mark.parametrize("model_type", ["qwen3_next", "jamba", "deepseek_v3", "minimax"])
def test_models_without_a_paged_cache_write_what_generate_writes(model_type):
    """Recurrent states, latent attention, and a cache of the model's own whose rows cannot be dropped."""
    model = tiny(model_type)
    prompts = random_prompts(5, 19, 5, 33, 5)
    lengths = [12, 4, 3, 7, 9]
    with running(model, "auto") as engine:
        inbox = run(
            engine,
            [request(str(index), prompts[index], max_tokens=lengths[index], ignore_eos=True) for index in range(5)],
        )
    for index in range(5):
        expected = generate(model, prompts[index], lengths[index], eos_token_id=-1)
        assert inbox.tokens(str(index)) == expected


@pytest.fixture
def offloads(monkeypatch) -> list[bool]:
    """Whether memory was found, for each time that the paged cache was short of it."""
    outcomes: list[bool] = []
    offload = OffloadingManager.offload_requests
    monkeypatch.setattr(
        OffloadingManager, "offload_requests", lambda self: outcomes.append(offload(self)) or outcomes[-1]
    )
    return outcomes


def test_requests_that_are_started_over_for_want_of_memory_write_the_same(model, offloads):
    prompts = random_prompts(10, 12, 9, 11)
    with running(model, kv_tokens=96) as engine:
        inbox = run(engine, [request(str(index), prompts[index], max_tokens=40, ignore_eos=True) for index in range(4)])
    assert any(offloads), "the cache was never short"
    for index in range(4):
        assert inbox.tokens(str(index)) == generate(model, prompts[index], 40, eos_token_id=-1)


def test_a_request_that_gave_its_memory_to_others_goes_on_when_they_are_cancelled(model, offloads):
    prompts = random_prompts(10, 12, 9, 11)
    inbox = Inbox()
    with running(model, kv_tokens=96) as engine:

        def cancel_the_others(kwargs: Any) -> None:
            if any(offloads):
                for index in range(3):
                    engine.cancel(str(index))

        with ForwardHook(model, cancel_the_others):
            for index in range(4):
                engine.submit(request(str(index), prompts[index], max_tokens=60, ignore_eos=True), inbox)
            inbox.wait_finished(["3"])
    assert not any(inbox.last(str(index)).finish_reason for index in range(3)), "they were still running"
    assert inbox.tokens("3") == generate(model, prompts[3], 60, eos_token_id=-1)


def test_a_shared_prefix_is_computed_once_and_changes_nothing(model):
    [prefix] = random_prompts(32)
    first, second = [*prefix, 3, 4, 5], [*prefix, 6, 7]
    num_computed = []
    with running(model) as engine, ForwardHook(model, lambda kwargs: num_computed.append(kwargs["input_ids"].numel())):
        inbox = run(engine, [request("first", first)])
        num_first = sum(num_computed)
        num_computed.clear()
        inbox.events |= run(engine, [request("second", second)]).events
    assert inbox.tokens("first") == generate(model, first, 12)
    assert inbox.tokens("second") == generate(model, second, 12)
    assert num_first >= len(first)
    assert sum(num_computed) <= 2 + 12


SAMPLED = {
    "temperature": 1.2,
    "seed": 11,
    "top_p": 0.95,
    "min_p": 0.01,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.2,
    "repetition_penalty": 1.1,
    "logit_bias": {9: 1.5},
    "min_tokens": 5,
    "max_tokens": 24,
}


def sampled_alone(model: Any, prompt: list[int]) -> list[int]:
    with running(model) as engine:
        return run(engine, [request("alone", prompt, **SAMPLED)]).tokens("alone")


def test_a_seeded_request_samples_the_same_alone_in_a_batch_and_on_either_engine(model):
    prompts = random_prompts(9, 3, 17, 9, 25, 1, 30, 9)
    alone = sampled_alone(model, prompts[0])
    assert len(set(alone)) > 8, "sampling must vary for the comparison to mean anything"
    requests = [request(str(index), prompt, **SAMPLED | {"seed": 11 + index}) for index, prompt in enumerate(prompts)]
    for kind in ("continuous", "simple"):
        with running(model, kind) as engine:
            assert run(engine, requests[::-1]).tokens("0") == alone


def test_other_seeds_sample_other_tokens(model):
    [prompt] = random_prompts(9)
    with running(model) as engine:
        inbox = run(engine, [request(str(seed), prompt, **SAMPLED | {"seed": seed}) for seed in range(6)])
    assert len({tuple(inbox.tokens(str(seed))) for seed in range(6)}) == 6


@both_kinds
def test_a_resumed_request_goes_on_as_if_nothing_had_happened(model, kind):
    [prompt] = random_prompts(9)
    whole = sampled_alone(model, prompt)
    with running(model, kind) as engine:
        cuts = range(len(whole))
        inbox = run(engine, [request(str(cut), prompt + whole[:cut], num_resumed=cut, **SAMPLED) for cut in cuts])
    for cut in cuts:
        assert inbox.tokens(str(cut)) == whole[cut:]
        assert inbox.last(str(cut)).finish_reason == "length"


# --- how it ends -----------------------------------------------------------------------------------------------------


@both_kinds
def test_a_request_ends_at_its_stop_tokens_and_not_before_min_tokens(model, kind):
    [prompt] = random_prompts(9)
    free = generate(model, prompt, 12, eos_token_id=-1)
    stop = free[4]
    first = free.index(stop)
    with running(model, kind) as engine:
        inbox = run(
            engine,
            [
                request("stop", prompt, stop_token_ids=(stop,)),
                request("later", prompt, stop_token_ids=(stop,), min_tokens=first + 2),
                request("one", prompt, max_tokens=1),
            ],
        )
    assert inbox.tokens("stop") == free[: first + 1]
    assert inbox.last("stop").finish_reason == "stop"
    assert inbox.tokens("later")[:first] == free[:first]
    assert stop not in inbox.tokens("later")[: first + 2]
    assert inbox.tokens("one") == free[:1]
    assert inbox.last("one").finish_reason == "length"


@both_kinds
def test_the_end_of_sequence_ends_a_request_unless_it_is_ignored(model, kind):
    [prompt] = random_prompts(9)
    bias = {EOS: 1000.0}
    with running(model, kind) as engine:
        inbox = run(
            engine,
            [
                request("ends", prompt, logit_bias=bias),
                request("goes on", prompt, logit_bias=bias, ignore_eos=True),
                request("holds out", prompt, logit_bias=bias, min_tokens=3),
            ],
        )
    assert inbox.tokens("ends") == [EOS]
    assert inbox.last("ends").finish_reason == "stop"
    assert inbox.tokens("goes on") == [EOS] * 12
    assert inbox.last("goes on").finish_reason == "length"
    assert [token == EOS for token in inbox.tokens("holds out")] == [False, False, False, True]


# --- log-probabilities -----------------------------------------------------------------------------------------------


@both_kinds
def test_reported_logprobs_are_those_of_a_plain_forward(model, kind):
    [prompt] = random_prompts(9)
    with running(model, kind) as engine:
        inbox = run(engine, [request("r", prompt, temperature=0.7, top_k=5, top_logprobs=3, max_tokens=8)])
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([prompt + inbox.tokens("r")])).logits[0].log_softmax(-1)
    for index, event in enumerate(inbox.events["r"]):
        expected_V = logprobs_TV[len(prompt) + index - 1]
        assert event.logprob == pytest.approx(expected_V[event.token_id].item(), abs=1e-4)
        assert [token for token, _ in event.top_logprobs] == expected_V.topk(3).indices.tolist()
        assert [logprob for _, logprob in event.top_logprobs] == pytest.approx(
            expected_V.topk(3).values.tolist(), abs=1e-4
        )


@both_kinds
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_prompts_scores_are_those_of_a_plain_forward(model_type, kind, monkeypatch):
    monkeypatch.setattr("expertmesh.engine.score._CHUNK", 7)
    model = tiny(model_type)
    [prompt] = random_prompts(30)
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    greedy = generate(model, prompt, 4, eos_token_id=-1)
    with running(model, kind) as engine:
        scores = engine.score(tuple(prompt), 2)
        continued = engine.score((*prompt, *greedy), 1)
        assert run(engine, [request("after", prompt, max_tokens=4, ignore_eos=True)]).tokens("after") == greedy
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] == ()
    expected = logprobs_TV[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    assert list(scores.token_logprobs[1:]) == pytest.approx(expected, abs=1e-5)
    for position in range(1, len(prompt)):
        top = scores.top_logprobs[position]
        assert [token for token, _ in top] == logprobs_TV[position - 1].topk(2).indices.tolist()
    for token, logprob, top in zip(greedy, continued.token_logprobs[-4:], continued.top_logprobs[-4:], strict=True):
        assert top == ((token, logprob),), "a greedy token is its position's arg-max, with the identical float"


def test_a_score_never_runs_beside_a_step(model):
    inside = threading.Lock()
    leave = model.register_forward_hook(lambda *_: inside.release())

    def enter(kwargs: Any) -> None:
        assert inside.acquire(blocking=False), "two forwards ran at once"

    prompts = random_prompts(9, 12)
    with running(model) as engine, ForwardHook(model, enter):
        inbox = Inbox()
        engine.submit(request("r", prompts[0], max_tokens=40, ignore_eos=True), inbox)
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(engine.score(tuple(prompts[1]), 1))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        inbox.wait_finished(["r"])
    leave.remove()
    assert len(results) == 6
    assert inbox.last("r").finish_reason == "length"
