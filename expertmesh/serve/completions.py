"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from expertmesh.serve.answer import Answer, Fields, json_logprob, shows_token_ids, token_label
from expertmesh.serve.generation import Delta, Token
from expertmesh.serve.prompts import Choice, completion_prompts, plan_choices
from expertmesh.serve.schemas import CompletionBody
from expertmesh.serve.surface import Surface


def completion_routes(surface: Surface) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/completions")
    async def create_completion(request: Request, body: CompletionBody) -> Response:
        surface.check_model(body.model)
        answer_id = surface.new_id("cmpl-")
        prompts = await completion_prompts(surface, body)
        choices = plan_choices(surface, body, body.logprobs, prompts, answer_id)
        return await Answer(surface, body, CompletionShape(surface, body), answer_id, choices).respond(request)

    return routes


class CompletionShape:
    """Chunks look like whole answers here."""

    whole_object = chunk_object = "text_completion"

    def __init__(self, surface: Surface, body: CompletionBody) -> None:
        self._has_logprobs = body.logprobs is not None
        self._shows_token_ids = shows_token_ids(surface, body)
        self._label = token_label(surface, body)

    def opening(self, choice: Choice) -> Fields | None:
        return None

    def chunk(self, choice: Choice, delta: Delta, *, is_first: bool) -> Fields:
        return {"choices": [self._choice(choice, delta, is_first)]}

    def whole(self, choices: Sequence[Choice], deltas: Sequence[Delta]) -> Fields:
        pairs = zip(choices, deltas, strict=True)
        return {"choices": [self._choice(choice, delta, is_first=True) for choice, delta in pairs]}

    def _choice(self, choice: Choice, delta: Delta, is_first: bool) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "index": choice.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.tokens) if self._has_logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._shows_token_ids:
            fields["token_ids"] = [token.id for token in delta.generated]
            if is_first:
                fields["prompt_token_ids"] = choice.prompt.ids
        return fields

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Parallel lists. A text's first token has nothing before it, hence null."""
        return {
            "tokens": [self._label(token.id) for token in tokens],
            "token_logprobs": [None if token.logprob is None else json_logprob(token.logprob) for token in tokens],
            "top_logprobs": [self._ranked(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _ranked(self, token: Token) -> dict[str, float] | None:
        """Token text -> log-probability, most likely first, the token itself always among them.

        Tokens may share a text (parts of characters do): the likeliest stands for them, so the greatest value is the
        arg-max's, as evaluation harnesses read it.
        """
        if token.logprob is None:
            return None
        ranked: dict[str, float] = {}
        for token_id, logprob in (*token.top_logprobs, (token.id, token.logprob)):
            ranked.setdefault(self._label(token_id), json_logprob(logprob))
        return ranked
