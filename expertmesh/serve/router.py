"""The router: the dense model, its engine, and the exchange with the hosts. No Ray here.

Requests are token ids; answers are lists of token events, those that came since the last list together.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from expertmesh.allocator import FORWARD_BYTES, keep_freed_memory
from expertmesh.backbone import load_backbone
from expertmesh.checkpoint.source import resolve
from expertmesh.engine import EngineConfig, make_engine
from expertmesh.engine.api import PromptLogprobs, TokenEvent
from expertmesh.moe.exchange import Exchange, ExchangeLimits
from expertmesh.moe.layer import MoeLayer
from expertmesh.serve.card import model_card
from expertmesh.transport.network import NetworkTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from expertmesh.config import MeshConfig
    from expertmesh.engine.api import GenerateRequest
    from expertmesh.placement import Placement


class Router:
    """Runs one copy of the dense model against the hosts of a placement. Loading it takes seconds; it blocks."""

    def __init__(self, config: MeshConfig, placement: Placement, token: str) -> None:
        keep_freed_memory(FORWARD_BYTES)
        path = resolve(config.model)
        section = config.router
        backbone = load_backbone(path, dtype=config.dtype)
        backbone.model.to(section.device)
        self._exchange = Exchange(
            NetworkTransport(token),
            placement,
            ExchangeLimits(timeout_s=config.exchange.timeout_s, attempt_timeout_s=config.exchange.attempt_timeout_s),
        )
        backbone.connect([MoeLayer(self._exchange, layer) for layer in range(len(backbone.moe_modules))])
        self._engine = make_engine(
            backbone.model,
            EngineConfig(
                max_context=model_card(config).max_context,
                max_requests=section.max_requests,
                max_queue=section.max_queue,
                max_batch_tokens=section.max_batch_tokens,
                kv_tokens=section.kv_tokens,
            ),
            kind=section.engine,
        )

    @property
    def epoch(self) -> int:
        """Of the placement in use."""
        return self._exchange.placement.epoch

    def update(self, placement: Placement) -> None:
        """Use a newer placement; an older one changes nothing."""
        self._exchange.update(placement)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[TokenEvent]]:
        """The request's events until its end. Leaving early cancels it. Raises what `Engine.submit` raises."""
        loop = asyncio.get_running_loop()
        arrived: list[TokenEvent] = []
        news = asyncio.Event()

        def deliver(event: TokenEvent) -> None:
            arrived.append(event)
            news.set()

        self._engine.submit(request, lambda event: loop.call_soon_threadsafe(deliver, event))
        finished = False
        try:
            while not finished:
                await news.wait()
                events = arrived.copy()
                arrived.clear()
                news.clear()
                finished = events[-1].finish_reason is not None
                yield events
        finally:
            if not finished:
                self._engine.cancel(request.request_id)

    async def score(self, prompt_ids: tuple[int, ...], top_logprobs: int) -> PromptLogprobs:
        """Log-probabilities of a prompt's own tokens."""
        return await asyncio.to_thread(self._engine.score, prompt_ids, top_logprobs)

    @property
    def healthy(self) -> bool:
        return self._engine.healthy

    def close(self) -> None:
        """Fail what runs, and end all threads."""
        self._engine.close()
        self._exchange.close()
