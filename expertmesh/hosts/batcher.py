"""Joins the requests that arrive together into one launch."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expertmesh.hosts.host import Work
    from expertmesh.transport import LayerReply


class Batcher:
    """Collects work until the event loop has read all that is there, then computes it at once.

    It computes on the loop itself: while rows wait, nothing on a host is worth doing but to compute them, and what
    arrives in the meantime is joined in the next launch. Waiting for more on purpose would only add latency.
    """

    def __init__(self, compute: Callable[[Sequence[Work]], list[LayerReply]]) -> None:
        self._compute = compute
        self._waiting: list[tuple[Work, asyncio.Future[LayerReply]]] = []

    async def submit(self, work: Work) -> LayerReply:
        """The answer to `work`. Raises what the launch raised."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._flush)
        answer: asyncio.Future[LayerReply] = loop.create_future()
        self._waiting.append((work, answer))
        return await answer

    def _flush(self) -> None:
        batch, self._waiting = self._waiting, []
        try:
            replies = self._compute([work for work, _ in batch])
        except Exception as error:  # noqa: BLE001 - whatever a launch raises belongs to those who wait for it
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), reply in zip(batch, replies, strict=True):
            if not answer.done():  # else the router has gone
                answer.set_result(reply)
