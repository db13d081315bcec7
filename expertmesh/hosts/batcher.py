"""Joins the requests that arrive together into one launch."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expertmesh.hosts.host import Work
    from expertmesh.transport import LayerReply

    Done = Callable[[LayerReply | Exception], None]


class Batcher:
    """Collects work until the event loop has read all that is there, then computes it at once.

    It computes on the loop itself: while rows wait, nothing on a host is worth doing but to compute them, and what
    arrives in the meantime is joined in the next launch. Waiting for more on purpose would only add latency.
    """

    def __init__(self, compute: Callable[[Sequence[Work]], list[LayerReply]]) -> None:
        self._compute = compute
        self._waiting: list[tuple[Work, Done]] = []

    def submit(self, work: Work, done: Done) -> None:
        """Compute `work` soon; `done` gets its answer, or what the launch raised."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append((work, done))

    def _flush(self) -> None:
        batch, self._waiting = self._waiting, []
        try:
            replies = self._compute([work for work, _ in batch])
        except Exception as error:  # noqa: BLE001 - whatever a launch raises belongs to those who wait for it
            for _, done in batch:
                done(error)
            return
        for (_, done), reply in zip(batch, replies, strict=True):
            done(reply)
