"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from expertmesh.serve.answer import Answer, Fields, json_logprob, shows_token_ids, token_label
from expertmesh.serve.generation import Delta, Token
from expertmesh.serve.prompts import Choice, chat_prompt, plan_choices
from expertmesh.serve.schemas import ChatBody
from expertmesh.serve.surface import Surface


def chat_routes(surface: Surface) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions")
    async def create_chat_completion(request: Request, body: ChatBody) -> Response:
        surface.check_model(body.model)
        answer_id = surface.new_id("chatcmpl-")
        prompt = await chat_prompt(surface, body)
        choices = plan_choices(surface, body, body.num_top_logprobs, [prompt], answer_id)
        return await Answer(surface, body, ChatShape(surface, body), answer_id, choices).respond(request)

    return routes


class ChatShape:
    """A message when whole; a role, then pieces of content, when streamed."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, surface: Surface, body: ChatBody) -> None:
        self._codec = surface.require_codec("chat")
        self._has_logprobs = body.logprobs
        self._shows_token_ids = shows_token_ids(surface, body)
        self._label = token_label(surface, body)

    def opening(self, choice: Choice) -> Fields | None:
        delta = {"role": "assistant", "content": ""}
        fields = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {"choices": [fields], **self._prompt(choice)}

    def chunk(self, choice: Choice, delta: Delta, *, is_first: bool) -> Fields:
        return {"choices": [{"index": choice.index, "delta": {"content": delta.text}, **self._rest(delta)}]}

    def whole(self, choices: Sequence[Choice], deltas: Sequence[Delta]) -> Fields:
        written = []
        for choice, delta in zip(choices, deltas, strict=True):
            message = {"role": "assistant", "content": delta.text, "refusal": None}
            written.append({"index": choice.index, "message": message, **self._rest(delta)})
        return {"choices": written, **self._prompt(choices[0])}

    def _prompt(self, choice: Choice) -> dict[str, Any]:
        return {"prompt_token_ids": choice.prompt.ids} if self._shows_token_ids else {}

    def _rest(self, delta: Delta) -> dict[str, Any]:
        fields: dict[str, Any] = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        if self._has_logprobs:
            fields["logprobs"] = {"content": [self._entry(token) for token in delta.tokens], "refusal": None}
        else:
            fields["logprobs"] = None
        if self._shows_token_ids:
            fields["token_ids"] = [token.id for token in delta.tokens]
        return fields

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [self._logprob(token_id, logprob) for token_id, logprob in token.top_logprobs]
        return {**self._logprob(token.id, token.logprob or 0.0), "top_logprobs": top}

    def _logprob(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._label(token_id)
        return {"token": text, "logprob": json_logprob(logprob), "bytes": list(self._codec.token_bytes(token_id))}
