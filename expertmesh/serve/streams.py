"""Answers that last: server-sent events, and the cancelling of work whose client has gone.

Invariant: when a client disconnects, its work is cancelled at once, streamed or not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from expertmesh.serve.problems import ClientDisconnectedError, problem_of

T = TypeVar("T")
SendEvent = Callable[[Mapping[str, Any]], Awaitable[None]]

logger = logging.getLogger(__name__)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; raise ClientDisconnectedError, with `work` cancelled and ended, if the client goes first."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_wait_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnectedError
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _wait_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events as OpenAI's clients read them, written by `produce` with the function that it is given.

    The status line goes out with the first event, so what fails before that is answered as any other error; what
    fails after it becomes an event. Each stream ends with `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(self, produce: Callable[[SendEvent], Awaitable[None]]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._produce = produce
        self._is_started = False
        self._one_at_a_time = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._run(send))
        except ClientDisconnectedError:
            if not self._is_started:
                raise

    async def _run(self, send: Send) -> None:
        async def send_event(event: Mapping[str, Any]) -> None:
            await self._write(send, to_json(event))

        try:
            await self._produce(send_event)
        except Exception as error:
            if not self._is_started:
                raise
            problem = problem_of(error)
            logger.warning("a stream broke: %s", problem.message, exc_info=problem.is_defect)
            await send_event(problem.body())
        await self._write(send, b"[DONE]", more=False)

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        async with self._one_at_a_time:
            if not self._is_started:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                self._is_started = True
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})
