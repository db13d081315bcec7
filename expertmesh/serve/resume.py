"""Requests that outlive their routers: what one leaves unsaid, another says.

Owns what the next router is asked for, given what those before it said, and how long a request waits for one. Does not
know Ray or HTTP. Invariant: what the caller sees is one undisturbed answer, however many routers it took, because the
next token depends on nothing but the tokens before it, the seed and the position.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from expertmesh.clock import Clock
from expertmesh.engine.api import GenerateRequest, PromptLogprobs, TokenEvent
from expertmesh.errors import NoRouterError, OverloadedError, RouterGoneError
from expertmesh.gates.spec import GateSpec
from expertmesh.serve.backend import Backend, MeshOrder, MeshView

T = TypeVar("T")

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to put up with routers."""

    no_router_s: float
    """How long a request waits for a router to take it, from the last word of the one before."""
    silence_s: float = 10.0
    """A router that has a request and says nothing for so long is as good as gone. They speak up every three."""
    falls: int = 5
    """So many routers in a row that end before they add a token: the request may be what ends them."""
    first_pause_s: float = 0.05
    """After the second of them; after each that follows twice as long, up to a second."""


class Resumption:
    """One request: what has been said of it, and what remains to be asked for."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._said: list[int] = []
        self._attempts = 0
        self.is_finished = False
        self.gone: RouterGoneError | None = None
        """Set when the router itself has said that it ends."""

    def next_request(self) -> GenerateRequest:
        """What to ask a router for now. Each has an id of its own: the router before may not know yet that it lost."""
        self._attempts += 1
        self.gone = None
        if self._attempts == 1:
            return self._request
        return replace(
            self._request,
            request_id=f"{self._request.request_id}~{self._attempts}",
            prompt_ids=(*self._request.prompt_ids, *self._said),
            num_resumed=self._request.num_resumed + len(self._said),
        )

    def take(self, events: Sequence[TokenEvent]) -> list[TokenEvent]:
        """The events as the caller is to see them: as of one request, up to where the router is `gone`."""
        seen = []
        for event in events:
            if isinstance(event.cause, RouterGoneError):
                self.gone = event.cause
                break
            if event.token_id is not None:
                self._said.append(event.token_id)
            self.is_finished = event.finish_reason is not None
            seen.append(replace(event, request_id=self._request.request_id))
        return seen


class Resuming:
    """A `Backend` over one whose routers may end at any moment. Raises NoRouterError when none comes in time."""

    def __init__(self, backend: Backend, patience: Patience, clock: Clock) -> None:
        self._backend = backend
        self._patience = patience
        self._clock = clock

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenEvent], None]:
        work, waiting = Resumption(request), _Waiting(self._patience, self._clock)
        while True:
            try:
                async with aclosing(self._attempt(work.next_request(), waiting)) as batches:
                    async for events in batches:
                        if seen := work.take(events):
                            waiting.went_on()
                            yield seen
                        if work.is_finished:
                            return
                        if work.gone is not None:
                            raise work.gone
            except RouterGoneError as error:
                logger.info("request %s goes on with another router after %s", request.request_id, error)
                await waiting.after_fall(error)
            except TimeoutError:
                waiting.check()  # one that is on its way to a router that hangs must not stay there
            except OverloadedError as error:
                if not waiting.has_begun:
                    raise
                await waiting.pause(error)  # the routers that are left will have room

    async def _attempt(self, request: GenerateRequest, waiting: _Waiting) -> AsyncGenerator[list[TokenEvent], None]:
        """One router's part. Raises RouterGoneError if it breaks off, TimeoutError if none takes it for a while."""
        is_taken = False
        async with aclosing(self._backend.generate(request)) as batches:
            while True:
                try:
                    async with asyncio.timeout(min(self._patience.silence_s, waiting.left_s)):
                        events = await anext(batches)
                except StopAsyncIteration:
                    raise RouterGoneError("the router's answer broke off") from None
                except TimeoutError:
                    if not is_taken:
                        raise
                    raise RouterGoneError(f"the router said nothing for {self._patience.silence_s:g} s") from None
                is_taken = True
                waiting.heard()
                yield events

    async def score(
        self, prompt_ids: tuple[int, ...], top_logprobs: int, gate: GateSpec | None = None
    ) -> PromptLogprobs:
        return await self._repeat(lambda: self._backend.score(prompt_ids, top_logprobs, gate))

    def trace(self, seconds: float) -> AsyncGenerator[bytes, None]:
        return self._backend.trace(seconds)  # of one router: another has seen other requests

    async def mesh(self, what: MeshView) -> Any:
        return await self._repeat(lambda: self._backend.mesh(what))

    async def order(self, what: MeshOrder, values: dict[str, Any]) -> Any:
        return await self._backend.order(what, values)  # it may have been carried out already

    async def healthy(self) -> bool:
        return await self._backend.healthy()

    async def _repeat(self, call: Callable[[], Awaitable[T]]) -> T:
        """A call that changes nothing, as often as routers end under it."""
        waiting = _Waiting(self._patience, self._clock)
        while True:
            try:
                return await call()
            except RouterGoneError as error:
                await waiting.after_fall(error)


class _Waiting:
    """How long a request has been without a router, and whether it should go on waiting."""

    def __init__(self, patience: Patience, clock: Clock) -> None:
        self._patience = patience
        self._clock = clock
        self._heard_s = clock.monotonic()
        self._falls = 0
        self._pauses = 0
        self.has_begun = False
        """Whether a router has taken the request before: to refuse it now would break a promise."""

    @property
    def left_s(self) -> float:
        return max(0.0, self._heard_s + self._patience.no_router_s - self._clock.monotonic())

    def heard(self) -> None:
        """A router has said something."""
        self._heard_s = self._clock.monotonic()
        self.has_begun = True

    def went_on(self) -> None:
        """There are new tokens."""
        self._falls = self._pauses = 0

    def check(self) -> None:
        """Raises NoRouterError when it has been too long."""
        if self.left_s <= 0:
            raise NoRouterError(f"no router took the request within {self._patience.no_router_s:g} s; retry later")

    async def after_fall(self, error: RouterGoneError) -> None:
        """Wait before the next attempt, the first of which comes at once. Raises NoRouterError if it is pointless."""
        self.has_begun = True
        self._falls += 1
        if self._falls >= self._patience.falls:
            raise NoRouterError(f"{self._falls} routers in a row ended under this request ({error})") from error
        if self._falls > 1:
            await self.pause(error)

    async def pause(self, error: Exception) -> None:
        """Wait a little, and longer each time. Raises NoRouterError when it has been too long."""
        pause_s = min(_LONGEST_PAUSE_S, self._patience.first_pause_s * 2 ** min(self._pauses, 16))
        if pause_s >= self.left_s:
            raise NoRouterError(f"no router for {self._patience.no_router_s:g} s ({error}); retry later") from error
        self._pauses += 1
        await asyncio.sleep(pause_s)
