"""How much a gateway takes on: a place for each choice, and no more choices than places.

What is refused is refused here, before it has cost a router anything, with the time after which it is worth another
try. Knows nothing of HTTP or Ray. Invariant: never more choices under way than places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from expertmesh.clock import Clock
from expertmesh.engine.api import GenerateRequest, PromptLogprobs, TokenEvent
from expertmesh.errors import OverloadedError
from expertmesh.gates.spec import GateSpec
from expertmesh.serve.backend import Backend, MeshOrder, MeshView

_WINDOW_S = 60.0
"""What ended longer ago says nothing of how fast choices end now."""
_MOST_ENDS = 256
_LEAST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0


class Places:
    """The places, of which `running` can be worked on at once, and how fast they become free."""

    def __init__(self, limit: int, running: int, clock: Clock) -> None:
        self._limit = limit
        self._running = running
        self._clock = clock
        self._taken = 0
        self._ends: deque[float] = deque(maxlen=_MOST_ENDS)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a place. Raises OverloadedError when there is none, or when whoever has it is refused further on."""
        if self._taken >= self._limit:
            raise OverloadedError(f"{self._taken} sequences are under way or waiting", retry_after_s=self.wait_s)
        self._taken += 1
        is_refused = False
        try:
            yield
        except OverloadedError as error:
            error.retry_after_s, is_refused = self.wait_s, True
            raise
        finally:
            self._taken -= 1
            if not is_refused:
                self._ends.append(self._clock.monotonic())

    @property
    def wait_s(self) -> float:
        """How long until what waits now has begun: its number over the rate at which choices have been ending."""
        now_s = self._clock.monotonic()
        while self._ends and self._ends[0] < now_s - _WINDOW_S:
            self._ends.popleft()
        waiting = self._taken - self._running
        if len(self._ends) < 2 or waiting <= 0:
            return _LEAST_WAIT_S
        seconds_per_end = (now_s - self._ends[0]) / len(self._ends)
        return min(max(waiting * seconds_per_end, _LEAST_WAIT_S), _LONGEST_WAIT_S)


class Admitting:
    """A `Backend` that takes on no more than it has places for."""

    def __init__(self, backend: Backend, places: Places) -> None:
        self._backend = backend
        self._places = places

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenEvent], None]:
        with self._places.one():
            async with aclosing(self._backend.generate(request)) as batches:
                async for events in batches:
                    yield events

    async def score(
        self, prompt_ids: tuple[int, ...], top_logprobs: int, gate: GateSpec | None = None
    ) -> PromptLogprobs:
        with self._places.one():
            return await self._backend.score(prompt_ids, top_logprobs, gate)

    def trace(self, seconds: float) -> AsyncGenerator[bytes, None]:
        return self._backend.trace(seconds)

    async def mesh(self, what: MeshView) -> Any:
        return await self._backend.mesh(what)

    async def order(self, what: MeshOrder, values: dict[str, Any]) -> Any:
        return await self._backend.order(what, values)

    async def healthy(self) -> bool:
        return await self._backend.healthy()
