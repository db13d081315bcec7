"""API keys: who may use the model, when the config names anyone.

Knows the keys' hashes and nothing of what requests ask for. Invariant: without a key, or the mesh's shared token, which
opens everything, a request gets no further than here, and not a byte of its body is read.

Open to all remain the paths that say how the mesh is and nothing of what it is asked: what monitors and balancers read,
and what `expertmesh top` shows. A trace is not among them: from the experts that a gate chose, much of a text can be
guessed.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Sequence
from typing import get_args

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from expertmesh.clock import Clock
from expertmesh.config import ApiKey
from expertmesh.errors import InvalidRequestError
from expertmesh.refusals import RefusalLog
from expertmesh.serve.backend import MeshView
from expertmesh.serve.problems import problem_of

logger = logging.getLogger(__name__)

OPEN_PATHS = {"/health", "/ping", "/version", "/metrics"} | {f"/mesh/{view}" for view in get_args(MeshView)}


def draw_key() -> str:
    """A new key. It has so much chance in it that a plain hash of it gives nothing away."""
    return f"em-{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """What the config says in its place."""
    return hashlib.sha256(key.encode("latin-1", "replace")).hexdigest()


class KeyGuard:
    """ASGI middleware: answers 401 to whoever has no key."""

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey], token: str | None, clock: Clock) -> None:
        self._app = app
        self._hashes = [key.sha256 for key in keys] + ([hash_of(token)] if token is not None else [])
        self._refusals = RefusalLog(logger, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope) and not self._has_key(Headers(scope=scope)):
            client = scope.get("client")
            self._refusals.refused(client[0] if client else "a client", "wrong or missing API key")
            error = InvalidRequestError(
                "send an API key of this mesh, as `Authorization: Bearer ...`", status=401, code="invalid_api_key"
            )
            await problem_of(error).response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hash_of(key)
        matches = [secrets.compare_digest(given, known) for known in self._hashes]  # all: the time is always the same
        return scheme.lower() == "bearer" and any(matches)
