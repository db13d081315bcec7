"""Engines over tiny random models: what the engine's tests share."""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from expertmesh.engine import EngineConfig, make_engine
from expertmesh.engine.api import GenerateRequest, SamplingParams, TokenEvent
from tests.architectures.checkpoints import Architecture, build_model

DEADLINE_S = 30
VOCAB = 128
EOS = 2
CONFIG = EngineConfig(max_requests=8, max_context=96, max_batch_tokens=16, max_queue=32, kv_tokens=8 * 96, page_size=8)
both_kinds = pytest.mark.parametrize("kind", ["continuous", "simple"])


def tiny(model_type: str, **overrides: Any) -> Any:
    return build_model(Architecture(experts_class="", model_type=model_type, auto_class=None), **overrides)


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
    return output[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()


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
