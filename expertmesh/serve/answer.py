"""How a generating request is answered, streamed or whole: what /v1/completions and /v1/chat/completions share.

Each of the two brings a `Shape`, which writes the fields that differ. Invariant: the chunks of a streamed answer add up
to the whole answer to the same request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fastapi import Request
from pydantic_core import to_json
from starlette.responses import Response

from expertmesh.serve.generation import Delta, run_choices
from expertmesh.serve.prompts import Choice
from expertmesh.serve.schemas import GenerateBody
from expertmesh.serve.streams import EventStream, SendEvent, while_connected
from expertmesh.serve.surface import Surface

Fields = Mapping[str, Any]

_LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


class Shape(Protocol):
    """One API's way of writing an answer, beyond id, created, model and usage."""

    whole_object: str
    chunk_object: str

    def opening(self, choice: Choice) -> Fields | None:
        """A choice's first chunk, before any of its text; None for an API without one."""
        ...

    def chunk(self, choice: Choice, delta: Delta, *, is_first: bool) -> Fields: ...

    def whole(self, choices: Sequence[Choice], deltas: Sequence[Delta]) -> Fields:
        """`deltas` holds, for each choice, all that it said."""
        ...


class Answer:
    """One request being answered."""

    def __init__(
        self, surface: Surface, body: GenerateBody, shape: Shape, answer_id: str, choices: tuple[Choice, ...]
    ) -> None:
        self._surface = surface
        self._body = body
        self._shape = shape
        self._choices = choices
        self._head = {"id": answer_id, "created": int(surface.clock.wall()), "model": surface.card.name}
        # A prompt counts once, however many choices it has.
        self._prompt_tokens = sum(len(choice.prompt.ids) for choice in choices[:: body.n])
        self._completion_tokens = 0

    async def respond(self, request: Request) -> Response:
        self._surface.metrics.prompt_tokens.inc(self._prompt_tokens)
        if self._body.stream:
            return EventStream(self._stream)
        whole = await while_connected(request.receive, self._collect())
        return Response(to_json(whole), media_type="application/json")

    async def _collect(self) -> Fields:
        said: list[list[Delta]] = [[] for _ in self._choices]

        async def emit(choice: Choice, delta: Delta) -> None:
            self._completion_tokens += len(delta.generated)
            said[choice.index].append(delta)

        await run_choices(self._surface, self._body, self._choices, emit)
        fields = self._shape.whole(self._choices, [Delta.join(deltas) for deltas in said])
        return {"object": self._shape.whole_object, **self._head, **fields, "usage": self._usage()}

    async def _stream(self, send_event: SendEvent) -> None:
        options = self._body.stream_options
        started: set[int] = set()

        async def send(fields: Fields) -> None:
            chunk = {"object": self._shape.chunk_object, **self._head, **fields}
            if options.continuous_usage_stats:
                chunk["usage"] = self._usage()
            elif options.include_usage:
                chunk["usage"] = None
            await send_event(chunk)

        async def emit(choice: Choice, delta: Delta) -> None:
            is_first = choice.index not in started
            if is_first:
                started.add(choice.index)
                if opening := self._shape.opening(choice):
                    await send(opening)
            self._completion_tokens += len(delta.generated)
            await send(self._shape.chunk(choice, delta, is_first=is_first))

        await run_choices(self._surface, self._body, self._choices, emit)
        if options.include_usage:
            head = {"object": self._shape.chunk_object, **self._head}
            await send_event({**head, "choices": [], "usage": self._usage()})

    def _usage(self) -> Fields:
        prompt, completion = self._prompt_tokens, self._completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def token_label(surface: Surface, body: GenerateBody) -> Callable[[int], str]:
    """How an answer writes a token in its log-probabilities: as its text, or by number where there is no text."""
    if surface.codec is None or body.return_tokens_as_token_ids:
        return "token_id:{}".format
    return surface.codec.token_text


def shows_token_ids(surface: Surface, body: GenerateBody) -> bool:
    """Without a tokenizer the ids are all that an answer has."""
    return body.return_token_ids or surface.codec is None


def json_logprob(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
