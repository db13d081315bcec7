"""The router: the dense model, its engine, and the exchange with the hosts. No Ray here.

Requests are token ids; answers are the messages of `relay`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from expertmesh.allocator import FORWARD_BYTES, keep_freed_memory
from expertmesh.backbone import Gates, load_backbone
from expertmesh.checkpoint.source import resolve
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.engine import EngineConfig, make_engine
from expertmesh.engine.api import PromptLogprobs
from expertmesh.errors import InvalidRequestError
from expertmesh.moe.exchange import Exchange, ExchangeLimits
from expertmesh.moe.layer import MoeLayer
from expertmesh.serve.card import model_card
from expertmesh.serve.relay import Outbox
from expertmesh.trace.format import TraceHeader, encode_header, fingerprint
from expertmesh.trace.recorder import TraceRecorder
from expertmesh.transport.network import NetworkTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import numpy as np
    from numpy.typing import NDArray

    from expertmesh.config import MeshConfig
    from expertmesh.doubt import Doubt
    from expertmesh.engine.api import GenerateRequest, TokenEvent
    from expertmesh.gates.spec import GateSpec
    from expertmesh.placement import Placement
    from expertmesh.serve.relay import Message

BEAT_S = 3.0
"""A router that has a request says something at least this often, if only that it is there."""
TRACE_EVERY_S = 0.5
"""How often what was recorded is passed on."""


class Router:
    """Runs one copy of the dense model against the hosts of a placement. Loading it takes seconds; it blocks."""

    def __init__(self, config: MeshConfig, placement: Placement, token: str) -> None:
        keep_freed_memory(FORWARD_BYTES)
        self._config = config
        path = resolve(config.model)
        section = config.router
        backbone = load_backbone(path, dtype=config.dtype)
        backbone.model.to(section.device)
        gates = Gates(backbone, None if config.gate is None else config.gate.spec)
        self._exchange = Exchange(
            NetworkTransport(token, tls=config.network.tls_files),
            placement,
            ExchangeLimits(
                timeout_s=config.exchange.timeout_s,
                attempt_timeout_s=config.exchange.attempt_timeout_s,
                hedge_share=config.exchange.hedge_share,
                double_check_share=config.exchange.double_check_share,
            ),
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
            gates=gates,
        )
        self._heard: deque[tuple[Outbox, TokenEvent]] = deque()
        """By the engine's thread, and not yet put into outboxes."""
        self._outboxes: dict[str, Outbox] = {}
        """By gateway, while it waits for answers."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine.after_events(self._wake)

    def on_doubt(self, tell: Callable[[Doubt], object]) -> None:
        """Have `tell` called, on the engine's thread, with every doubt about a replica."""
        self._exchange.on_doubt(tell)

    @property
    def epoch(self) -> int:
        """Of the placement in use."""
        return self._exchange.placement.epoch

    def statistics(self) -> dict[str, Any]:
        """What it has done since its start and what it does now, in plain JSON values."""
        return {
            "epoch": self.epoch,
            **asdict(self._exchange.counts),
            "avoided": sorted(self._exchange.avoided),
            **asdict(self._engine.statistics()),
        }

    def update(self, placement: Placement) -> None:
        """Use a newer placement; an older one changes nothing. May take milliseconds: not on an event loop."""
        _ = placement.layers  # made here, lest the next exchange has to
        self._exchange.update(placement)

    async def generate(self, request: GenerateRequest, gateway: str) -> AsyncIterator[Message]:
        """The request's answer until its end, which may carry other requests' events, all of that gateway.

        There is a message at least every BEAT_S. Leaving early cancels the request. Raises what `Engine.submit` raises.
        """
        self._loop = asyncio.get_running_loop()
        outbox = self._outboxes.setdefault(gateway, Outbox())
        self._engine.submit(request, lambda event: self._heard.append((outbox, event)))
        outgoing = outbox.open(request.request_id)
        try:
            while not outgoing.is_told:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BEAT_S):
                        await outgoing.news.wait()
                yield outgoing.take()
        finally:
            if not outgoing.is_told:
                self._engine.cancel(request.request_id)
            outbox.close(request.request_id)
            if outbox.is_empty:
                del self._outboxes[gateway]

    def _wake(self) -> None:
        """Have what a step has said passed on: once, for to wake another thread costs more than to tell it."""
        if self._heard and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # a loop that was closed, whose requests are forgotten
                self._loop.call_soon_threadsafe(self._pass_on)

    def _pass_on(self) -> None:
        while self._heard:
            outbox, event = self._heard.popleft()
            outbox.put(event)

    async def trace(self, seconds: float) -> AsyncIterator[bytes]:
        """What the gates choose for so long, as a trace: its bytes as they come. One at a time."""
        if self._exchange.observe is not None:
            raise InvalidRequestError("a trace is being recorded already; wait for its end", status=409)
        recorder: TraceRecorder | None = None

        def observe(layer: int, index_TK: NDArray[np.int64]) -> None:
            nonlocal recorder
            if recorder is None:
                recorder = TraceRecorder(self._trace_header(index_TK.shape[1]), SYSTEM_CLOCK)
            recorder.record(layer, index_TK)

        ends_at = SYSTEM_CLOCK.monotonic() + seconds
        is_begun = False
        self._exchange.observe = observe
        try:
            while (left_s := ends_at - SYSTEM_CLOCK.monotonic()) > 0:
                await asyncio.sleep(min(left_s, TRACE_EVERY_S))
                if recorder is not None and (records := recorder.take()):
                    yield records if is_begun else encode_header(recorder.header) + records
                    is_begun = True
        finally:
            self._exchange.observe = None

    def _trace_header(self, top_k: int) -> TraceHeader:
        config = (resolve(self._config.model) / "config.json").read_bytes()
        return TraceHeader(
            model=self._config.name,
            fingerprint=fingerprint(config),
            num_experts=self._exchange.placement.num_experts,
            top_k=top_k,
            content="choices",
            origin={"recorded": True},
        )

    async def score(
        self, prompt_ids: tuple[int, ...], top_logprobs: int, gate: GateSpec | None = None
    ) -> PromptLogprobs:
        """Log-probabilities of a prompt's own tokens."""
        return await asyncio.to_thread(self._engine.score, prompt_ids, top_logprobs, gate)

    @property
    def healthy(self) -> bool:
        return self._engine.healthy

    def wait_end(self) -> None:
        """Block until the engine has ended, by `close` or by itself."""
        self._engine.wait_end()

    def close(self) -> None:
        """Fail what runs, and end all threads."""
        self._engine.close()
        self._exchange.close()
