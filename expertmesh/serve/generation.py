"""From the token plane's events to text: what each choice says, piece by piece, until it ends.

Owns detokenizing, stop strings, echo and the running of an answer's choices side by side. Knows nothing of HTTP or of
JSON. Invariant: however events are batched, the deltas of a choice join to the same text and the same end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from expertmesh.engine.api import FINISH_ERROR, FINISH_LENGTH, FINISH_STOP, PromptLogprobs, TokenEvent
from expertmesh.errors import ExpertMeshError
from expertmesh.serve.prompts import Choice, Prompt
from expertmesh.serve.schemas import GenerateBody
from expertmesh.serve.stops import StopMatcher
from expertmesh.serve.surface import Surface
from expertmesh.serve.text import TextCodec, TextStream

T = TypeVar("T")


class Token(NamedTuple):
    """One token of an answer."""

    id: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    """(token id, log-probability), most likely first."""
    offset: int
    """Characters of the choice's text before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a choice says next."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    num_echoed: int = 0
    """How many of the first tokens are the prompt's own."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token that ended the text; None at its own end."""

    @property
    def generated(self) -> tuple[Token, ...]:
        return self.tokens[self.num_echoed :]

    @classmethod
    def join(cls, deltas: Sequence[Delta]) -> Delta:
        """All of a choice's deltas as one."""
        return cls(
            text="".join(delta.text for delta in deltas),
            tokens=tuple(token for delta in deltas for token in delta.tokens),
            num_echoed=sum(delta.num_echoed for delta in deltas),
            finish_reason=deltas[-1].finish_reason,
            stop_reason=deltas[-1].stop_reason,
        )


class Transcript:
    """Writes down one choice. Without a codec its text stays empty and only the tokens speak."""

    def __init__(self, codec: TextCodec | None, body: GenerateBody) -> None:
        self._stream = TextStream(codec, skip_special_tokens=body.skip_special_tokens) if codec else None
        self._stops = StopMatcher(body.stop, include=body.include_stop_str_in_output)
        self._include_stop = body.include_stop_str_in_output
        self._stop_token_ids = frozenset(body.stop_token_ids)
        self._min_tokens = body.min_tokens
        self._num_tokens = 0

    def begin(self, prompt: Prompt) -> None:
        """Take the prompt as what comes before the text."""
        if self._stream:
            self._stream.prime(prompt.ids)

    def echo(self, prompt: Prompt, scored: PromptLogprobs | None) -> Delta:
        """Begin with the prompt as a part of the text."""
        tokens, texts = [], []
        for i, token_id in enumerate(prompt.ids):
            logprob, top = (scored.token_logprobs[i], scored.top_logprobs[i]) if scored else (None, ())
            tokens.append(Token(token_id, logprob, top, self._offset))
            texts.append(self._stream.push(token_id) if self._stream else "")
        text = "".join(texts) if prompt.text is None else prompt.text
        return Delta(text=text, tokens=tuple(tokens), num_echoed=len(tokens))

    def write(self, events: Sequence[TokenEvent]) -> Delta:
        """What the events add; events after a stop string add nothing. Raises ExpertMeshError if generation failed."""
        tokens, text = [], ""
        for event in events:
            if event.finish_reason == FINISH_ERROR:
                raise event.cause or ExpertMeshError(event.error or "generation failed")
            assert event.token_id is not None, "only an error brings no token"
            tokens.append(Token(event.token_id, event.logprob, event.top_logprobs, self._offset))
            text += self._say(event.token_id, ended=event.finish_reason == FINISH_STOP)
            if event.finish_reason and not self._stops.matched:
                text += self._rest()
            if self._stops.matched:
                reason = self._stops.matched
                return Delta(text=text, tokens=tuple(tokens), finish_reason=FINISH_STOP, stop_reason=reason)
            if event.finish_reason:
                stop_token = event.token_id if event.token_id in self._stop_token_ids else None
                return Delta(
                    text=text,
                    tokens=tuple(tokens),
                    finish_reason=event.finish_reason,
                    stop_reason=stop_token if event.finish_reason == FINISH_STOP else None,
                )
        return Delta(text=text, tokens=tuple(tokens))

    @property
    def _offset(self) -> int:
        return self._stream.length if self._stream else 0

    def _say(self, token_id: int, *, ended: bool) -> str:
        self._num_tokens += 1
        if self._stream is None or (ended and not self._include_stop):
            return ""
        text = self._stream.push(token_id)
        return text if self._num_tokens <= self._min_tokens else self._stops.push(text)

    def _rest(self) -> str:
        text = self._stops.push(self._stream.flush() if self._stream else "")
        return text if self._stops.matched else text + self._stops.flush()


Emit = Callable[[Choice, Delta], Awaitable[None]]


async def run_choices(surface: Surface, body: GenerateBody, choices: Sequence[Choice], emit: Emit) -> None:
    """Generate all choices at once, handing each delta to `emit` as it comes. The first failure ends them all."""
    scores: dict[Prompt, PromptLogprobs] = {}
    num_top = choices[0].request.sampling.top_logprobs
    if body.echo and num_top is not None:
        prompts = list(dict.fromkeys(choice.prompt for choice in choices))
        gate = choices[0].request.gate
        scored = await run_together(surface.backend.score(prompt.ids, num_top, gate) for prompt in prompts)
        scores = dict(zip(prompts, scored, strict=True))
    await run_together(_run_choice(surface, body, choice, scores.get(choice.prompt), emit) for choice in choices)


async def _run_choice(
    surface: Surface, body: GenerateBody, choice: Choice, scored: PromptLogprobs | None, emit: Emit
) -> None:
    transcript = Transcript(surface.codec, body)
    if body.echo:
        await emit(choice, transcript.echo(choice.prompt, scored))
    else:
        transcript.begin(choice.prompt)
    if choice.request.sampling.max_tokens == 0:
        await emit(choice, Delta(finish_reason=FINISH_LENGTH))
        return
    with surface.metrics.choice() as meter:
        async with aclosing(surface.backend.generate(choice.request)) as batches:
            async for events in batches:
                delta = transcript.write(events)
                meter.tokens(len(delta.tokens))
                await emit(choice, delta)
                if delta.finish_reason:
                    meter.finish_reason = delta.finish_reason
                    return
        raise ExpertMeshError("generation ended without a reason")


async def run_together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order. The first failure cancels the rest and is raised as itself, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
