"""The exchange: one scatter and gather of one layer, and the only retry loop of the token plane.

Owns the current placement and the transport. Its promise: every pair's result row comes back exactly once, computed
by *some* ready replica, or the exchange raises; a missing expert is never silently dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import uvloop

from expertmesh.errors import (
    DeadlineExceededError,
    NoReadyReplicaError,
    ReplicaFailedError,
    ReplicaUnavailableError,
)
from expertmesh.moe.dispatch import HostPart, make_dispatch_plan
from expertmesh.transport import LayerRequest, Transport

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from expertmesh.ids import HostId
    from expertmesh.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeLimits:
    """How long an exchange may take."""

    timeout_s: float = 60.0
    """For the whole exchange, waiting for a replica included."""
    attempt_timeout_s: float = 20.0
    """For one host's answer; after it, the rows go to another replica."""
    retry_s: float = 0.1
    """When no replica is left to ask: how long to wait for a new placement before asking all of them again."""


@dataclass(slots=True)
class _Rows:
    """The rows of one exchange under way. P pairs, B bytes per row."""

    layer: int
    dtype: str
    num_choices: int
    expert_P: NDArray[np.int64]
    x_TB: NDArray[np.uint8]
    y_PB: NDArray[np.uint8]


class Exchange:
    """Sends token rows to the hosts that hold their experts. One caller at a time; `update` from any thread.

    The caller's own thread drives the event loop while it waits: handing over to another thread and back would cost
    more than the rest of our part of an exchange.
    """

    def __init__(self, transport: Transport, placement: Placement, limits: ExchangeLimits | None = None) -> None:
        self._limits = limits or ExchangeLimits()
        self._transport = transport
        self._placement = placement
        self._loop = uvloop.new_event_loop()
        self._updated = asyncio.Event()

    @property
    def placement(self) -> Placement:
        return self._placement

    def update(self, placement: Placement) -> None:
        """Use `placement` from the next dispatch plan on, unless a newer one is known already."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._update, placement)

    def _update(self, placement: Placement) -> None:
        if placement.epoch > self._placement.epoch:
            self._placement = placement
            self._updated.set()
            self._updated = asyncio.Event()

    def run(self, layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """Compute every chosen expert on its token's row.

        x_TH is on CPU; index_TK holds expert indices of `layer`. Returns rows_TKH on CPU in x's dtype, neither
        weighted nor summed. Raises NoReadyReplicaError, ReplicaFailedError or DeadlineExceededError.
        """
        num_tokens, num_choices = index_TK.shape
        if num_tokens == 0:
            return x_TH.new_empty(0, num_choices, x_TH.shape[1])
        x = x_TH.contiguous()
        x_TB = x.view(torch.uint8).numpy()
        rows = _Rows(
            layer=layer,
            dtype=str(x.dtype).removeprefix("torch."),
            num_choices=num_choices,
            expert_P=index_TK.reshape(-1).numpy(),
            x_TB=x_TB,
            y_PB=np.empty((num_tokens * num_choices, x_TB.shape[1]), np.uint8),
        )
        self._loop.run_until_complete(self._run(rows))
        return torch.from_numpy(rows.y_PB).view(x.dtype).view(num_tokens, num_choices, -1)

    async def _run(self, rows: _Rows) -> None:
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await self._deliver(rows, np.arange(len(rows.expert_P)), frozenset())
        except TimeoutError:
            raise DeadlineExceededError(
                f"the experts of layer {rows.layer} did not answer within {self._limits.timeout_s:g} s",
                deadline_s=self._limits.timeout_s,
            ) from None

    async def _deliver(self, rows: _Rows, pairs: NDArray[np.int64], failed: frozenset[HostId]) -> None:
        """Get every one of `pairs` answered by a host that has not `failed` them yet."""
        parts = await self._plan(rows, pairs, failed)
        if len(parts) == 1:
            await self._send(rows, parts[0], failed)
            return
        results = await asyncio.gather(*(self._send(rows, part, failed) for part in parts), return_exceptions=True)
        for result in results:
            if result is not None:
                raise result

    async def _plan(self, rows: _Rows, pairs: NDArray[np.int64], failed: frozenset[HostId]) -> list[HostPart]:
        """Plan on the current placement; where that leaves an expert without a replica, wait, then ask all again."""
        while True:
            updated, placement = self._updated, self._placement
            try:
                usable = placement.without(failed) if failed else placement
                return make_dispatch_plan(usable, rows.layer, rows.expert_P, rows.num_choices, pairs)
            except NoReadyReplicaError:
                # Either the next placement helps, or the host does: its stream may have broken for a moment only.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(updated.wait(), self._limits.retry_s)
                failed = frozenset()

    async def _send(self, rows: _Rows, part: HostPart, failed: frozenset[HostId]) -> None:
        """Have one host answer its part; should it not, deliver the part's pairs elsewhere."""
        all_rows = len(part.tokens) == len(rows.x_TB)
        request = LayerRequest(
            layer=rows.layer,
            dtype=rows.dtype,
            rows=rows.x_TB if all_rows else rows.x_TB[part.tokens],
            pair_rows=part.pair_rows,
            experts=part.experts,
            counts=part.counts,
        )
        try:
            async with asyncio.timeout(self._limits.attempt_timeout_s):
                reply = await self._transport.call(part.host, request)
            if reply.rows.shape != (len(part.pairs), rows.y_PB.shape[1]):
                raise ReplicaFailedError(part.host.id, f"answered {reply.rows.shape}, not a row for each pair")
        except (ReplicaUnavailableError, TimeoutError):
            await self._deliver(rows, part.pairs, failed | {part.host.id})
        else:
            rows.y_PB[part.pairs] = reply.rows

    def close(self) -> None:
        """Break the connections. Idempotent; not while `run` runs."""
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._transport.close())
            self._loop.close()
