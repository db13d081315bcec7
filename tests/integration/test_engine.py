"""Both engines over tiny random models, against `generate` and plain forwards of the same models."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

from expertmesh.engine import EngineConfig, make_engine
from expertmesh.engine.api import GenerateRequest, SamplingParams, TokenEvent
from expertmesh.engine.continuous import why_not_continuous
from expertmesh.errors import (
    ConfigError,
    ExpertMeshError,
    InvalidRequestError,
    OverloadedError,
    ReplicaUnavailableError,
)
from expertmesh.ids import HostId
from tests.architectures.checkpoints import Architecture, build_model

DEADLINE_S = 30
VOCAB = 128
EOS = 2
CONFIG = EngineConfig(max_requests=8, max_context=96, max_batch_tokens=16, max_queue=32, kv_tokens=8 * 96, page_size=8)
both_kinds = pytest.mark.parametrize("kind", ["continuous", "simple"])


@pytest.fixture(autouse=True)
def quiet_transformers():
    transformers.logging.set_verbosity_error()


def tiny(model_type: str, **overrides: Any) -> Any:
    return build_model(Architecture(experts_class="", model_type=model_type, auto_class=None), **overrides)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("qwen3_moe")


@contextmanager
def running(model: Any, kind: str = "continuous", **limits: int):
    config = EngineConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__slots__} | limits)
    engine = make_engine(model, config, kind)
    try:
        yield engine
    finally:
        engine.close()
        assert engine._thread not in threading.enumerate()


class Inbox:
    """Takes events on the engine's thread; a test waits for them on its own."""

    def __init__(self) -> None:
        self.events: dict[str, list[TokenEvent]] = defaultdict(list)
        self._arrived = threading.Condition()

    def __call__(self, event: TokenEvent) -> None:
        with self._arrived:
            self.events[event.request_id].append(event)
            self._arrived.notify_all()

    def wait_until(self, condition) -> None:
        with self._arrived:
            assert self._arrived.wait_for(lambda: condition(self.events), DEADLINE_S), "no such events in time"

    def wait_finished(self, request_ids) -> None:
        self.wait_until(lambda events: all(self.last(request_id).finish_reason for request_id in request_ids))

    def last(self, request_id: str) -> TokenEvent:
        events = self.events[request_id]
        return events[-1] if events else TokenEvent(request_id=request_id)

    def tokens(self, request_id: str) -> list[int]:
        return [event.token_id for event in self.events[request_id] if event.token_id is not None]


def request(request_id: str, prompt_ids, *, num_resumed: int = 0, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 12, "temperature": 0.0} | sampling)
    return GenerateRequest(
        request_id=request_id, prompt_ids=tuple(prompt_ids), sampling=params, num_resumed=num_resumed
    )


def run(engine: Any, requests: list[GenerateRequest]) -> Inbox:
    inbox = Inbox()
    for each in requests:
        engine.submit(each, inbox)
    inbox.wait_finished([each.request_id for each in requests])
    for events in inbox.events.values():
        assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
    return inbox


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def generate(model: Any, prompt: list[int], num_tokens: int, **options: Any) -> list[int]:
    """The oracle: what `generate` writes greedily after one prompt, alone."""
    prompt_1T = torch.tensor([prompt])
    output = model.generate(
        prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=num_tokens, do_sample=False, **options
    )
    return output[0, len(prompt) :].tolist()


class ForwardHook:
    """Runs a function before each forward of a model, in the engine's thread: to stall it, or to make it raise."""

    def __init__(self, model: Any, before) -> None:
        self._handle = model.register_forward_pre_hook(lambda module, args, kwargs: before(kwargs), with_kwargs=True)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


class Gate:
    """Holds every forward back until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, kwargs: Any) -> None:
        self.reached.set()
        assert self.opened.wait(DEADLINE_S)


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


# --- cancelling ------------------------------------------------------------------------------------------------------


@both_kinds
def test_nothing_follows_a_cancel_from_within_the_callback(model, kind):
    prompts = random_prompts(9, 9)
    inbox = Inbox()
    with running(model, kind) as engine:

        def cancel_third(event: TokenEvent) -> None:
            inbox(event)
            if len(inbox.events["gone"]) == 3:
                engine.cancel("gone")

        engine.submit(request("gone", prompts[0], max_tokens=40, ignore_eos=True), cancel_third)
        engine.submit(request("stays", prompts[1], max_tokens=40, ignore_eos=True), inbox)
        inbox.wait_finished(["stays"])
        assert len(inbox.events["gone"]) == 3
        assert inbox.tokens("stays") == generate(model, prompts[1], 40, eos_token_id=-1)


@both_kinds
def test_a_request_cancelled_while_the_model_computes_its_token_never_gets_it(model, kind):
    prompts = random_prompts(9, 9)
    gate, inbox = Gate(), Inbox()
    with running(model, kind) as engine, ForwardHook(model, gate):
        engine.submit(request("r", prompts[0], max_tokens=40), inbox)
        assert gate.reached.wait(DEADLINE_S)
        engine.cancel("r")
        engine.submit(request("r", prompts[1], max_tokens=5, ignore_eos=True), inbox)
        gate.opened.set()
        inbox.wait_finished(["r"])
    assert inbox.tokens("r") == generate(model, prompts[1], 5, eos_token_id=-1), "the id's new owner gets its own only"


@both_kinds
def test_a_cancelled_request_gives_its_place_and_its_memory_back(model, kind):
    prompts = random_prompts(40, 40, 40)
    with running(model, kind, max_requests=1, kv_tokens=96) as engine:
        inbox = Inbox()
        for index in range(3):
            engine.submit(request(str(index), prompts[index], max_tokens=50, ignore_eos=True), inbox)
        inbox.wait_until(lambda events: len(events["0"]) > 1)
        engine.cancel("1")
        engine.cancel("0")
        engine.cancel("never heard of")
        inbox.wait_finished(["2"])
        assert inbox.tokens("2") == generate(model, prompts[2], 50, eos_token_id=-1)
        assert not inbox.events["1"]
        assert engine.statistics().running == engine.statistics().waiting == 0


# --- failing ---------------------------------------------------------------------------------------------------------


@both_kinds
def test_a_forward_that_raises_fails_the_requests_of_its_step_only(model, kind):
    prompts = random_prompts(9, 9, 9)
    steps = []

    def fail_third(kwargs: Any) -> None:
        steps.append(kwargs)
        if len(steps) == 3:
            raise ReplicaUnavailableError(HostId("host-7"), "connection refused")

    with running(model, kind, max_requests=2) as engine, ForwardHook(model, fail_third):
        inbox = run(engine, [request(str(index), prompts[index], ignore_eos=True) for index in range(3)])
        again = run(engine, [request("again", prompts[0], ignore_eos=True)])
        assert engine.healthy
    failed = [index for index in range(3) if inbox.last(str(index)).finish_reason == "error"]
    assert failed in ([0], [1], [0, 1])
    for index in failed:
        assert inbox.last(str(index)).error == "host host-7 is unavailable: connection refused"
        assert inbox.last(str(index)).token_id is None
        tokens = inbox.tokens(str(index))
        assert tokens == generate(model, prompts[index], 12, eos_token_id=-1)[: len(tokens)]
    assert inbox.tokens("2") == generate(model, prompts[2], 12, eos_token_id=-1)
    assert again.tokens("again") == generate(model, prompts[0], 12, eos_token_id=-1), "the cache holds no torn blocks"


@both_kinds
def test_logits_that_are_not_finite_fail_their_request(model, kind):
    prompts = random_prompts(9, 9)
    breaking = model.lm_head.register_forward_hook(lambda module, args, output: output.fill_(torch.nan))
    with running(model, kind) as engine:
        assert run(engine, [request("bad", prompts[0])]).last("bad").error == "the model's logits are not finite"
        breaking.remove()
        assert run(engine, [request("good", prompts[1])]).tokens("good") == generate(model, prompts[1], 12)


@both_kinds
def test_a_listener_that_raises_loses_its_own_request_only(model, kind, caplog):
    prompts = random_prompts(9, 9)

    def broken(event: TokenEvent) -> None:
        raise KeyError("listener")

    inbox = Inbox()
    with running(model, kind) as engine, caplog.at_level(logging.ERROR, "expertmesh.engine"):
        engine.submit(request("broken", prompts[0], max_tokens=40), broken)
        engine.submit(request("r", prompts[1], max_tokens=20, ignore_eos=True), inbox)
        inbox.wait_finished(["r"])
        assert engine.healthy
    assert inbox.tokens("r") == generate(model, prompts[1], 20, eos_token_id=-1)
    assert [record.args for record in caplog.records] == [("broken",)]


@both_kinds
def test_a_dead_thread_fails_everything_and_says_so(model, kind, monkeypatch):
    prompts = random_prompts(9, 9)
    gate, inbox = Gate(), Inbox()
    with running(model, kind, max_requests=1) as engine, ForwardHook(model, gate):
        engine.submit(request("running", prompts[0]), inbox)
        engine.submit(request("waiting", prompts[1]), inbox)
        assert gate.reached.wait(DEADLINE_S)
        assert engine.healthy

        def broken() -> list:
            raise LookupError("no such block")

        monkeypatch.setattr(engine._batch, "schedule", broken)
        gate.opened.set()
        inbox.wait_finished(["running", "waiting"])
        for request_id in ("running", "waiting"):
            assert "LookupError: no such block" in inbox.last(request_id).error
        engine._thread.join(DEADLINE_S)
        assert not engine.healthy
        with pytest.raises(ExpertMeshError, match="no such block"):
            engine.submit(request("late", prompts[0]), inbox)


@both_kinds
def test_closing_fails_what_runs_and_leaves_no_thread(kind):
    model = tiny("gpt_oss")
    prompts = random_prompts(9, 9)
    gate, inbox = Gate(), Inbox()
    engine = make_engine(model, CONFIG, kind)
    with ForwardHook(model, gate):
        engine.submit(request("r", prompts[0]), inbox)
        assert gate.reached.wait(DEADLINE_S)
        closing = threading.Thread(target=engine.close)
        closing.start()
        gate.opened.set()
        closing.join(DEADLINE_S)
    engine.close()
    assert inbox.last("r").finish_reason == "error"
    assert "closed" in inbox.last("r").error
    assert not [thread for thread in threading.enumerate() if thread.name == "expertmesh-engine"]
    assert not engine.healthy
    assert engine.statistics().running == 0
    with pytest.raises(ExpertMeshError, match="closed"):
        engine.submit(request("late", prompts[1]), inbox)
    with pytest.raises(ExpertMeshError, match="closed"):
        engine.score((3, 4), 1)
    assert generate(model, prompts[0], 3), "the model runs on its own again"


# --- limits ----------------------------------------------------------------------------------------------------------


@both_kinds
def test_a_full_queue_refuses_and_statistics_count(model, kind):
    prompts = random_prompts(9, 9, 9, 9)
    gate, inbox = Gate(), Inbox()
    with running(model, kind, max_requests=1, max_queue=2) as engine, ForwardHook(model, gate):
        engine.submit(request("0", prompts[0], max_tokens=4, ignore_eos=True), inbox)
        assert gate.reached.wait(DEADLINE_S)
        for index in (1, 2):
            engine.submit(request(str(index), prompts[index], max_tokens=4, ignore_eos=True), inbox)
        with pytest.raises(OverloadedError, match="2 requests are waiting"):
            engine.submit(request("3", prompts[3]), inbox)
        before = engine.statistics()
        gate.opened.set()
        inbox.wait_finished(["0", "1", "2"])
        engine.submit(request("3", prompts[3], max_tokens=4, ignore_eos=True), inbox)
        inbox.wait_finished(["3"])
        after = engine.statistics()
    assert (before.running, before.waiting, before.generated_tokens) == (1, 2, 0)
    assert (after.running, after.waiting, after.generated_tokens) == (0, 0, 16)
    assert after.steps >= 16


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (request("r", []), "prompt"),
        (request("r", [3, VOCAB]), "prompt"),
        (request("r", [-1]), "prompt"),
        (request("r", [3] * 90, max_tokens=7), "max_tokens"),
        (request("r", [3], max_tokens=0), "max_tokens"),
        (request("r", [3, 4, 5], max_tokens=2, num_resumed=2), "max_tokens"),
        (request("r", [3], logit_bias={VOCAB: 1.0}), "logit_bias"),
        (request("r", [3], stop_token_ids=(VOCAB,)), "stop_token_ids"),
        (request("taken", [3]), "request_id"),
    ],
)
def test_what_can_never_succeed_is_refused_by_name(model, bad, param):
    gate = Gate()
    with running(model) as engine, ForwardHook(model, gate):
        engine.submit(request("taken", [3], max_tokens=1), Inbox())
        with pytest.raises(InvalidRequestError) as refused:
            engine.submit(bad, Inbox())
        gate.opened.set()
    assert refused.value.param == param


def test_the_longest_request_that_is_accepted_runs(model):
    [prompt] = random_prompts(90)
    with running(model, kv_tokens=96) as engine:
        assert len(run(engine, [request("r", prompt, max_tokens=6, ignore_eos=True)]).tokens("r")) == 6
        with pytest.raises(InvalidRequestError, match="context is 96"):
            engine.score((3,) * 97, 1)


@pytest.mark.parametrize(
    "limits",
    [{"max_requests": 0}, {"page_size": 2}, {"kv_tokens": 95}, {"max_requests": 17}],
    ids=lambda limits: next(iter(limits)),
)
def test_limits_that_contradict_each_other_are_refused_by_name(model, limits):
    with pytest.raises(ConfigError, match=next(iter(limits))), running(model, **limits):
        pass


def test_a_cache_that_cannot_hold_one_request_is_refused():
    """Full and sliding layers draw on the same memory in units that do not divide it."""
    layer_types = ["full_attention"] * 3 + ["sliding_attention"] * 2
    model = tiny("gpt_oss", num_hidden_layers=5, layer_types=layer_types)
    with (
        pytest.raises(ConfigError, match="kv_tokens is 16"),
        running(model, max_context=16, kv_tokens=16, page_size=16),
    ):
        pass
    assert len(generate(model, [3, 4], 3, eos_token_id=-1)) == 3, "the model is as it was"


@pytest.mark.parametrize(
    ("model_type", "obstacle"),
    [
        ("qwen3_moe", None),
        ("mixtral", None),
        ("gpt_oss", None),
        ("qwen3_next", "recurrent state"),
        ("minimax", "linear_attention"),
        ("deepseek_v3", "plain keys and values"),
        ("mimo_v2_flash", "not of one size"),
        ("gemma4_text", "no single size of head"),
    ],
)
def test_continuous_batching_is_offered_what_its_cache_can_hold(model_type, obstacle):
    reason = why_not_continuous(tiny(model_type))
    assert (reason is None) == (obstacle is None)
    assert (obstacle or "") in (reason or "")


def test_an_engine_that_cannot_run_the_model_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"recurrent state.*use 'auto' or 'simple'"):
        make_engine(tiny("qwen3_next"), CONFIG, "continuous")
