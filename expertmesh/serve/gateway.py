"""The gateway: the OpenAI surface over a router. No Ray here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from expertmesh.checkpoint.source import resolve
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.serve.admission import Admitting, Places
from expertmesh.serve.backend import Backend, Limits
from expertmesh.serve.card import model_card
from expertmesh.serve.openai_api import create_app
from expertmesh.serve.resume import Patience, Resuming
from expertmesh.serve.text import load_codec

if TYPE_CHECKING:
    from fastapi import FastAPI

    from expertmesh.config import MeshConfig


def gateway_app(config: MeshConfig, backend: Backend, token: str) -> FastAPI:
    """The HTTP app of one mesh: the model's card and tokenizer come from the checkpoint, the rest from `backend`,
    whose routers may end at any moment.

    `token` is the mesh's shared token, which operators send.
    """
    resuming = Resuming(backend, Patience(no_router_s=config.router.resume_s), SYSTEM_CLOCK)
    running = math.ceil(config.router.replicas * config.router.max_requests / config.gateway.replicas)
    admitting = Admitting(resuming, Places(config.places, running, SYSTEM_CLOCK))
    limits = Limits(max_body_bytes=int(config.gateway.max_body), max_choices=min(Limits().max_choices, config.places))
    keys = config.gateway.api_keys
    return create_app(admitting, model_card(config), load_codec(resolve(config.model)), limits, token=token, keys=keys)
