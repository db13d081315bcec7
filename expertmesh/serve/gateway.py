"""The gateway: the OpenAI surface over a router. No Ray here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expertmesh.checkpoint.source import resolve
from expertmesh.serve.backend import Backend, Limits
from expertmesh.serve.card import model_card
from expertmesh.serve.openai_api import create_app
from expertmesh.serve.text import load_codec

if TYPE_CHECKING:
    from fastapi import FastAPI

    from expertmesh.config import MeshConfig


def gateway_app(config: MeshConfig, backend: Backend, token: str) -> FastAPI:
    """The HTTP app of one mesh: the model's card and tokenizer come from the checkpoint, the rest from `backend`.

    `token` is the mesh's shared token, which operators send.
    """
    limits = Limits(max_body_bytes=int(config.gateway.max_body))
    return create_app(backend, model_card(config), load_codec(resolve(config.model)), limits, token=token)
