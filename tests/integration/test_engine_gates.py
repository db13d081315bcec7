"""Requests with a gate of their own among others, against `generate` of a model that has that gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertmesh.backbone import Backbone, Gates
from expertmesh.engine import make_engine
from expertmesh.engine.api import GenerateRequest
from expertmesh.errors import InvalidRequestError
from expertmesh.gates.spec import GateSpec
from tests.integration.engines import CONFIG, both_kinds, generate, random_prompts, request, run, tiny
from tests.unit.test_gating import backbone_of

MODEL = "qwen3_moe"
NUM_TOKENS = 6
TOP_1 = GateSpec(strategy="softmax-topk", k=1)
TOP_3 = GateSpec(strategy="softmax-topk", k=3)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbone_of(MODEL)


@pytest.fixture(scope="module")
def oracles() -> dict[GateSpec | None, Any]:
    return {None: tiny(MODEL), TOP_1: tiny(MODEL, num_experts_per_tok=1), TOP_3: tiny(MODEL, num_experts_per_tok=3)}


def gated(name: str, prompt: list[int], gate: GateSpec | None) -> GenerateRequest:
    plain = request(name, prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
    return GenerateRequest(request_id=name, prompt_ids=plain.prompt_ids, sampling=plain.sampling, gate=gate)


@both_kinds
def test_each_request_is_answered_as_by_a_model_with_its_gate(kind: str, backbone, oracles) -> None:
    """Prompts are the same by twos and threes, and longer than a page: none may read another's keys."""
    long, longer = random_prompts(21, 37)
    asked = [(long, None), (long, TOP_1), (longer, TOP_3), (long, TOP_3), (longer, None), (longer, TOP_1)]
    engine = make_engine(backbone.model, CONFIG, kind, Gates(backbone))
    try:
        for turn in range(2):  # the second finds what the first has left in the cache
            requests = [gated(f"{turn}-{i}", prompt, gate) for i, (prompt, gate) in enumerate(asked)]
            inbox = run(engine, requests[:1])
            inbox.events |= run(engine, requests[1:]).events
            for asking, (prompt, gate) in zip(requests, asked, strict=True):
                expected = generate(oracles[gate], prompt, NUM_TOKENS, min_new_tokens=NUM_TOKENS)
                assert inbox.tokens(asking.request_id) == expected
    finally:
        engine.close()
    answers = [tuple(generate(oracles[gate], longer, NUM_TOKENS, min_new_tokens=NUM_TOKENS)) for gate in oracles]
    assert len(set(answers)) == 3, "the gates must make a difference for this to be a test"


@both_kinds
def test_a_prompt_is_scored_by_the_gate_asked_for(kind: str, backbone, oracles) -> None:
    (prompt,) = random_prompts(19)
    engine = make_engine(backbone.model, CONFIG, kind, Gates(backbone))
    try:
        for gate, oracle in oracles.items():
            scored = engine.score(tuple(prompt), 0, gate).token_logprobs[1:]
            with torch.no_grad():
                logprobs = oracle(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
            expected = logprobs[:-1].gather(1, torch.tensor(prompt)[1:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(scored), expected, atol=1e-4, rtol=0)
    finally:
        engine.close()


def test_a_gate_that_the_model_cannot_have_is_the_requests_fault(backbone) -> None:
    engine = make_engine(backbone.model, CONFIG, "continuous", Gates(backbone))
    try:
        with pytest.raises(InvalidRequestError, match=r"gate\.k is 7, but the layer has 6 experts") as refused:
            engine.submit(gated("r", [5, 6], GateSpec(strategy="softmax-topk", k=7)), print)
        assert refused.value.param == "gate"
        with pytest.raises(InvalidRequestError, match=r"gate\.k is 7"):
            engine.score((5, 6), 0, GateSpec(strategy="top-p", top_p=0.5, k=7))
    finally:
        engine.close()


def test_an_engine_without_gates_says_so(backbone) -> None:
    engine = make_engine(backbone.model, CONFIG)
    try:
        with pytest.raises(InvalidRequestError, match="this model's gate cannot be changed"):
            engine.submit(gated("r", [5, 6], TOP_1), print)
    finally:
        engine.close()
