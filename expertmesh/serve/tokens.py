"""POST /tokenize, POST /detokenize and GET /tokenizer_info, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from expertmesh.errors import InvalidRequestError
from expertmesh.serve.prompts import chat_prompt, check_token_ids, encode
from expertmesh.serve.schemas import ChatBody, DetokenizeBody, TokenizeBody
from expertmesh.serve.surface import Surface


def token_routes(surface: Surface) -> APIRouter:
    routes = APIRouter(tags=["tokenizer"])

    @routes.post("/tokenize")
    async def tokenize(raw_body: dict[str, Any]) -> dict[str, Any]:
        try:
            body = (ChatBody if "messages" in raw_body else TokenizeBody).model_validate(raw_body)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        surface.check_model(body.model)
        codec = surface.require_codec("/tokenize")
        if isinstance(body, ChatBody):
            ids = (await chat_prompt(surface, body)).ids
        else:
            ids = await encode(codec, body.prompt, add_special_tokens=body.add_special_tokens)
        strings = await asyncio.to_thread(codec.token_texts, ids) if body.return_token_strs else None
        context = surface.card.max_context
        return {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": strings}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        surface.check_model(body.model)
        check_token_ids(surface, body.tokens, "tokens")
        return {"prompt": surface.require_codec("/detokenize").decode(body.tokens, skip_special_tokens=False)}

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        if surface.codec is None:
            raise InvalidRequestError(f"{surface.card.name!r} is served without a tokenizer", status=404)
        return {**surface.codec.describe(), "model_max_length": surface.card.max_context}

    return routes
