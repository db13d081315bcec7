"""Every architecture that writes text, on the engine that "auto" picks for it."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers

from expertmesh.engine import EngineConfig, make_engine
from expertmesh.engine.api import GenerateRequest, SamplingParams, TokenEvent
from tests.architectures.checkpoints import SKIPPED, Architecture, build_model, find_architectures

ARCHITECTURES = [each for each in find_architectures() if each.generates and each.experts_class not in SKIPPED]
CONFIG = EngineConfig(max_requests=4, max_context=64, max_batch_tokens=16, max_queue=4, kv_tokens=256, page_size=8)
PROMPT_LENGTHS = (5, 19, 5, 33)
"""Two prompts that can be grouped, one that is split, and two that outgrow every tiny sliding window."""
NUM_TOKENS = (8, 4, 3, 6)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.experts_class)
def test_an_architecture_writes_what_generate_writes(architecture: Architecture):
    transformers.logging.set_verbosity_error()
    model = build_model(architecture)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 100, (1, length), generator=generator) for length in PROMPT_LENGTHS]
    written: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    num_running = threading.Semaphore(0)

    def on_event(event: TokenEvent) -> None:
        written[event.request_id].append(event.token_id)
        if event.finish_reason is not None:
            num_running.release()

    engine = make_engine(model, CONFIG)
    for index, (prompt, num_tokens) in enumerate(zip(prompts, NUM_TOKENS, strict=True)):
        params = SamplingParams(max_tokens=num_tokens, min_tokens=num_tokens, temperature=0)
        engine.submit(
            GenerateRequest(request_id=str(index), prompt_ids=tuple(prompt[0].tolist()), sampling=params), on_event
        )
    for _ in prompts:
        assert num_running.acquire(timeout=30)
    engine.close()
    for index, (prompt, num_tokens) in enumerate(zip(prompts, NUM_TOKENS, strict=True)):
        length = {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **length)
        num_before = 1 if model.config.is_encoder_decoder else prompt.shape[1]
        assert written[str(index)] == expected[0, num_before:].tolist()
