"""What happens to every HTTP request before and after its endpoint: its id, its count, its size. Plain ASGI.

(Starlette's own base class for middleware would hide disconnects from the endpoints.)
"""

from __future__ import annotations

import asyncio
import logging
import random
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertmesh.errors import InvalidRequestError
from expertmesh.serve.metrics import ServeMetrics
from expertmesh.serve.problems import problem_of

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,200}")
_JSON = re.compile(r"application/([\w.+-]+\+)?json\s*(;.*)?", re.IGNORECASE)

_LONGEST_LENGTH = 18
"""Digits of a content-length that is still read as a number."""

logger = logging.getLogger(__name__)


class RequestContext:
    """Gives each request an id, the client's own if it sent one, counts it, and answers 500 for what nobody caught."""

    def __init__(self, app: ASGIApp, metrics: ServeMetrics, rng: random.Random) -> None:
        self._app = app
        self._metrics = metrics
        self._rng = rng

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"{self._rng.getrandbits(128):032x}"
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:  # the process's boundary: the log gets the trace, the client a 500
                logger.exception("request %s failed", request_id)
                if not status:
                    await problem_of(error).response()(scope, receive, send_with_id)
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.http_requests.labels(route, str(status)).inc()


class HeaderGuard:
    """Refuses headers that are too long; the servers in front of an app differ in what they let through."""

    def __init__(self, app: ASGIApp, max_header_bytes: int) -> None:
        self._app = app
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and sum(len(name) + len(value) for name, value in scope["headers"]) > (
            self._max_header_bytes
        ):
            error = InvalidRequestError(f"the headers are longer than {self._max_header_bytes} bytes", status=431)
            await problem_of(error).response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


class BodyGuard:
    """Reads each body whole before anything else sees it; refuses one that is too long, too slow or not JSON."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._body_timeout_s):
                body = await self._read(receive, Headers(scope=scope))
        except TimeoutError:
            error = InvalidRequestError(f"the body took longer than {self._body_timeout_s:g} s", status=408)
            await problem_of(error).response()(scope, receive, send)
            return
        except InvalidRequestError as error:
            await problem_of(error).response()(scope, receive, send)
            return
        if body is None:
            return
        is_read = False

        async def replay() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive, headers: Headers) -> bytes | None:
        """The whole body, or None if the client went away. Raises InvalidRequestError, as soon as it is clear."""
        announced = headers.get("content-length", "0")
        digits = announced.lstrip("0")
        if digits.isdecimal() and (len(digits) > _LONGEST_LENGTH or int(digits) > self._max_body_bytes):
            raise self._too_long()
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self._max_body_bytes:
                raise self._too_long()
        if size and not _JSON.fullmatch(headers.get("content-type", "")):
            raise InvalidRequestError("send JSON, with content-type: application/json", status=415)
        return b"".join(parts)

    def _too_long(self) -> InvalidRequestError:
        return InvalidRequestError(f"the body is longer than {self._max_body_bytes} bytes", status=413)
