"""How requests and engines end early: cancelling, failing, refusing, closing."""

from __future__ import annotations

import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers

from expertmesh.engine import make_engine
from expertmesh.engine.api import TokenEvent
from expertmesh.engine.continuous import why_not_continuous
from expertmesh.errors import (
    ConfigError,
    ExpertMeshError,
    InvalidRequestError,
    NotFiniteError,
    OverloadedError,
    ReplicaUnavailableError,
    RouterGoneError,
)
from expertmesh.ids import HostId
from tests.integration.engines import (
    CONFIG,
    DEADLINE_S,
    VOCAB,
    ForwardHook,
    Gate,
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
    inbox = Inbox()
    with running(model, kind, max_requests=1, kv_tokens=96) as engine:

        def cancel_second(event: TokenEvent) -> None:
            inbox(event)
            if len(inbox.events["0"]) == 2:
                engine.cancel("1")
                engine.cancel("0")
                engine.cancel("never heard of")

        for index, listener in enumerate((cancel_second, inbox, inbox)):
            engine.submit(request(str(index), prompts[index], max_tokens=50, ignore_eos=True), listener)
        inbox.wait_finished(["2"])
        statistics = engine.statistics()
    assert inbox.tokens("2") == generate(model, prompts[2], 50, eos_token_id=-1)
    assert not inbox.events["1"]
    assert statistics.running == statistics.waiting == 0
    assert statistics.steps <= 2 * (3 + 50) - 45, "the cancelled requests took no more steps"


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
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_fail_their_request_and_no_other_of_its_batch(model, kind, poison):
    prompts = random_prompts(8, 8)
    gate, inbox, calls = Gate(), Inbox(), []

    def break_last_row(module: Any, args: Any, output: torch.Tensor) -> None:
        calls.append(output.shape)
        if len(calls) == 3:
            output.view(-1, output.shape[-1])[-1, 5] = poison

    with running(model, kind) as engine, ForwardHook(model, gate):
        for index in range(2):
            engine.submit(request(str(index), prompts[index], ignore_eos=True, top_logprobs=1), inbox)
        breaking = model.lm_head.register_forward_hook(break_last_row)
        gate.opened.set()
        inbox.wait_finished(["0", "1"])
        breaking.remove()
        assert engine.healthy
    ends = {index: inbox.last(str(index)) for index in range(2)}
    (bad,) = [index for index, end in ends.items() if end.finish_reason == "error"]
    assert isinstance(ends[bad].cause, NotFiniteError)
    assert ends[bad].error == "the model's logits are not finite"
    assert inbox.tokens(str(1 - bad)) == generate(model, prompts[1 - bad], 12, eos_token_id=-1)
    assert all(math.isfinite(event.logprob) for index in "01" for event in inbox.events[index] if event.token_id)


@both_kinds
def test_a_prompt_whose_logits_are_not_finite_has_no_score(model, kind):
    def break_one(module: Any, args: Any, output: torch.Tensor) -> None:
        output[..., 4, 7] = torch.nan

    with running(model, kind) as engine:
        breaking = model.lm_head.register_forward_hook(break_one)
        with pytest.raises(NotFiniteError):
            engine.score(tuple(random_prompts(9)[0]), 1)
        breaking.remove()


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
            assert isinstance(inbox.last(request_id).cause, RouterGoneError), "another router can go on with it"
        engine.wait_end()
        assert not engine.healthy
        with pytest.raises(RouterGoneError, match="no such block"):
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


@both_kinds
def test_a_resumed_request_is_not_refused_and_goes_before_those_that_wait(model, kind):
    prompts = random_prompts(9, 9, 9)
    gate, inbox, order = Gate(), Inbox(), []
    with running(model, kind, max_requests=1, max_queue=1) as engine, ForwardHook(model, gate):
        engine.submit(request("runs", prompts[0], max_tokens=2, ignore_eos=True), inbox)
        assert gate.reached.wait(DEADLINE_S)
        for each in (
            request("waits", prompts[1], max_tokens=2, ignore_eos=True),
            request("resumed", prompts[2], max_tokens=4, num_resumed=2, ignore_eos=True),
        ):
            engine.submit(each, lambda event: (order.append(event.request_id), inbox(event)))
        gate.opened.set()
        inbox.wait_finished(["runs", "waits", "resumed"])
    assert order == ["resumed"] * 2 + ["waits"] * 2


def test_prompts_that_wait_to_be_scored_are_bounded(model):
    gate = Gate()
    with running(model, max_queue=1) as engine, ForwardHook(model, gate), ThreadPoolExecutor(2) as callers:
        first = callers.submit(engine.score, (3, 4), 1)
        assert gate.reached.wait(DEADLINE_S)
        second = callers.submit(engine.score, (5, 6), 1)
        pause = threading.Event()
        while not engine._scores:  # until pytest's own limit
            pause.wait(0.01)
        with pytest.raises(OverloadedError, match="1 prompts wait"):
            engine.score((7, 8), 1)
        gate.opened.set()
        assert first.result(DEADLINE_S).token_logprobs[0] is None
        assert second.result(DEADLINE_S).token_logprobs[0] is None


def test_the_simple_engine_keeps_within_its_memory(model):
    """It cannot take memory back from a request, so it admits no more than can all grow to their full length."""
    prompts = random_prompts(10, 10, 10)
    gate, inbox = Gate(), Inbox()
    with running(model, "simple", kv_tokens=96) as engine, ForwardHook(model, gate):
        for index in range(3):
            engine.submit(request(str(index), prompts[index], max_tokens=38), inbox)
        assert gate.reached.wait(DEADLINE_S)
        statistics = engine.statistics()
        gate.opened.set()
        inbox.wait_finished(["0", "1", "2"])
    assert statistics.running <= 2
    assert statistics.running + statistics.waiting == 3


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
        ("llama4_text", "chunked_attention"),
        ("switch_transformers", "encoder"),
    ],
)
def test_continuous_batching_is_offered_what_its_cache_can_hold(model_type, obstacle):
    reason = why_not_continuous(tiny(model_type))
    assert (reason is None) == (obstacle is None)
    assert (obstacle or "") in (reason or "")


def test_an_engine_that_cannot_run_the_model_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"recurrent state.*use 'auto' or 'simple'"):
        make_engine(tiny("qwen3_next"), CONFIG, "continuous")
