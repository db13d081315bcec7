"""A token plane that says what a script tells it: the double for everything above `serve.backend.Backend`.

Its log-probabilities are those of a closed-form model, so that tests can work them out on their own. Invariant: what it
answers to a request depends on nothing but the request.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import queue
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from expertmesh.engine.api import (
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    GenerateRequest,
    PromptLogprobs,
    TokenEvent,
)
from expertmesh.errors import NoControllerError

if TYPE_CHECKING:
    from expertmesh.gates.spec import GateSpec

Step = int | tuple[int, ...] | Exception | str
"""A token; tokens that arrive together; an error to raise; or the text of an error that the engine reports."""
Script = Callable[[GenerateRequest], Iterable[Step]]

_DECAY = 0.25


def scripted_logprob(previous: int, token_id: int, vocab_size: int) -> float:
    """log p(token | previous) of the closed-form model: the likeliest token is `previous` itself, then those after it
    in turn, each exp(1/4) times less likely than the one before, around the vocabulary."""
    distance = (token_id - previous) % vocab_size
    log_sum = math.log((1 - math.exp(-_DECAY * vocab_size)) / (1 - math.exp(-_DECAY)))
    return -_DECAY * distance - log_sum


class ScriptedBackend:
    """Follows `script(request)`, minding `max_tokens`, end-of-sequence and stop tokens as an engine does.

    A script that runs out first stalls until its iterator is closed, as a mesh without hosts would.
    """

    def __init__(
        self,
        script: Script,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        mesh: dict[str, Any] | None = None,
        trace: bytes = b"",
    ) -> None:
        self.is_healthy = True
        self.requests: list[GenerateRequest] = []
        self.started: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Ids of the requests, as they begin; a test may wait on it from any thread."""
        self.cancelled: queue.SimpleQueue[str] = queue.SimpleQueue()
        """The same of those whose iterators were closed early, as they end."""
        self._script = script
        self._trace = trace
        self._vocab_size = vocab_size
        self._eos = frozenset(eos_token_ids)
        self.views = mesh or {}
        """What `mesh` answers; the views that are missing are those that no controller answers."""
        self.orders: list[tuple[str, dict[str, Any]]] = []
        self.refusal: Exception | None = None
        """Raised by `order`."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenEvent], None]:
        self.requests.append(request)
        self.started.put(request.request_id)
        events: list[TokenEvent] = []
        previous, count = request.prompt_ids[-1], request.num_resumed
        try:
            for step in self._script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, str):
                    yield [TokenEvent(request_id=request.request_id, finish_reason=FINISH_ERROR, error=step)]
                    return
                events = []
                for token_id in step if isinstance(step, tuple) else (step,):
                    count += 1
                    events.append(self._event(request, previous, token_id, count))
                    previous = token_id
                    if events[-1].finish_reason:
                        break
                yield events
                if events[-1].finish_reason:
                    return
            await asyncio.Event().wait()
        except (GeneratorExit, asyncio.CancelledError):
            if not (events and events[-1].finish_reason):
                self.cancelled.put(request.request_id)
            raise

    async def score(
        self, prompt_ids: tuple[int, ...], top_logprobs: int, gate: GateSpec | None = None
    ) -> PromptLogprobs:
        pairs = list(itertools.pairwise(prompt_ids))
        return PromptLogprobs(
            token_logprobs=(None, *(scripted_logprob(before, token, self._vocab_size) for before, token in pairs)),
            top_logprobs=((), *(self._top(before, max(top_logprobs, 1)) for before, _ in pairs)),
        )

    async def trace(self, seconds: float) -> AsyncGenerator[bytes, None]:
        yield self._trace

    async def mesh(self, what: str) -> Any:
        if what not in self.views:
            raise NoControllerError("the script says nothing of the mesh")
        return self.views[what]

    async def order(self, what: str, values: dict[str, Any]) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.orders.append((what, values))
        return {"accepted": True}

    async def healthy(self) -> bool:
        return self.is_healthy

    def _event(self, request: GenerateRequest, previous: int, token_id: int, count: int) -> TokenEvent:
        sampling = request.sampling
        ends = token_id in sampling.stop_token_ids or (token_id in self._eos and not sampling.ignore_eos)
        finish_reason = FINISH_STOP if ends else FINISH_LENGTH if count >= sampling.max_tokens else None
        num_top = sampling.top_logprobs
        return TokenEvent(
            request_id=request.request_id,
            token_id=token_id,
            logprob=None if num_top is None else scripted_logprob(previous, token_id, self._vocab_size),
            top_logprobs=() if num_top is None else self._top(previous, num_top),
            finish_reason=finish_reason,
        )

    def _top(self, previous: int, num_top: int) -> tuple[tuple[int, float], ...]:
        ranked = [(previous + i) % self._vocab_size for i in range(num_top)]
        return tuple((token_id, scripted_logprob(previous, token_id, self._vocab_size)) for token_id in ranked)
