"""The gateway's HTTP surface, put together: OpenAI's API with vLLM's additions, over any `Backend`.

A request's way: `middleware` (id, size) -> `schemas` (bounds) -> `prompts` (ids, one request per choice) ->
`generation` (events to text) -> `answer` with a `Shape` from `completions` or `chat` -> `streams`; and whatever fails
on it leaves through `problems`. Knows nothing of Ray.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from importlib import metadata

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.responses import Response

from expertmesh.clock import SYSTEM_CLOCK, Clock
from expertmesh.config import ApiKey
from expertmesh.errors import ExpertMeshError
from expertmesh.serve.backend import Backend, Limits, ModelCard
from expertmesh.serve.chat import chat_routes
from expertmesh.serve.completions import completion_routes
from expertmesh.serve.keys import KeyGuard
from expertmesh.serve.metrics import ServeMetrics
from expertmesh.serve.middleware import BodyGuard, HeaderGuard, RequestContext
from expertmesh.serve.operations import operation_routes
from expertmesh.serve.problems import ClientDisconnectedError, problem_of
from expertmesh.serve.status import status_routes
from expertmesh.serve.surface import Surface
from expertmesh.serve.text import TextCodec
from expertmesh.serve.tokens import token_routes

logger = logging.getLogger(__name__)


def create_app(
    backend: Backend,
    card: ModelCard,
    codec: TextCodec | None,
    limits: Limits,
    *,
    token: str | None = None,
    keys: Sequence[ApiKey] = (),
    clock: Clock = SYSTEM_CLOCK,
    rng: random.Random | None = None,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """The app that serves one model. Without a codec it takes and gives token ids only.

    `token` is what orders to the mesh must bring; without one there are none. `keys`, if any, are who may use the
    model. `rng` makes ids and the seeds of unseeded requests; `registry` is what /metrics shows, for others to add to.
    """
    rng = rng or random.SystemRandom()
    metrics = ServeMetrics(registry or CollectorRegistry(), clock)
    surface = Surface(backend=backend, card=card, codec=codec, limits=limits, clock=clock, rng=rng, metrics=metrics)
    app = FastAPI(title="expertmesh", version=metadata.version("expertmesh"), redirect_slashes=False)
    for routes in (completion_routes, chat_routes, token_routes, status_routes):
        app.include_router(routes(surface))
    if token is not None:
        app.include_router(operation_routes(backend, token))
    for kind in (ExpertMeshError, HTTPException, RequestValidationError, ClientDisconnectedError):
        app.add_exception_handler(kind, _answer_problem)
    app.add_middleware(BodyGuard, max_body_bytes=limits.max_body_bytes, body_timeout_s=limits.body_timeout_s)
    if keys:
        app.add_middleware(KeyGuard, keys=keys, token=token, clock=clock)
    app.add_middleware(HeaderGuard, max_header_bytes=limits.max_header_bytes)
    app.add_middleware(RequestContext, metrics=metrics, rng=rng)
    return app


async def _answer_problem(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    if problem.status >= 500:
        logger.warning("%s %s: %s", request.method, request.url.path, problem.message)
    return problem.response()
