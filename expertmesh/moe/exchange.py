"""The exchange: one scatter and gather of one layer, and the only retry loop of the token plane.

Owns the current placement and the transport. Its promise: every pair's result row comes back exactly once, computed
by *some* ready replica, or the exchange raises; a missing expert is never silently dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.errors import DeadlineExceededError, NoReadyReplicaError, ReplicaFailedError
from expertmesh.kernels.spec import DTYPES
from expertmesh.moe.dispatch import HostPart, make_dispatch_plan
from expertmesh.transport import LayerReply, LayerRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from expertmesh.clock import Clock
    from expertmesh.ids import HostId
    from expertmesh.placement import Placement
    from expertmesh.transport import Transport


_DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeLimits:
    """How long an exchange may take."""

    timeout_s: float = 60.0
    """For the whole exchange, waiting for a replica included."""
    attempt_timeout_s: float = 20.0
    """For one host's answer; after it, the rows go to another replica."""
    retry_s: float = 0.1
    """When no replica is left to ask: how long to wait for a new placement before asking all of them again."""


class _Todo(NamedTuple):
    """Pairs that nobody is computing at the moment."""

    pairs: NDArray[np.int64]
    failed: frozenset[HostId]
    """Hosts that have failed them."""


class _Attempt(NamedTuple):
    """A part that a host was asked for."""

    part: HostPart
    failed: frozenset[HostId]
    """Hosts that have failed its pairs before."""
    deadline: float

    def again(self) -> _Todo:
        """Its pairs, for any host but this one and those before."""
        return _Todo(self.part.pairs, self.failed | {self.part.host.id})


@dataclass(slots=True)
class _Run:
    """One exchange under way. T tokens, P pairs, B bytes per row."""

    layer: int
    dtype: str
    num_choices: int
    expert_P: NDArray[np.int64]
    x_TB: NDArray[np.uint8]
    y_PB: NDArray[np.uint8]
    todo: list[_Todo]
    attempts: dict[int, _Attempt] = field(default_factory=dict)
    """By the ticket of the request."""


class Exchange:
    """Sends token rows to the hosts that hold their experts. One caller at a time; `update` from any thread."""

    def __init__(
        self,
        transport: Transport,
        placement: Placement,
        limits: ExchangeLimits | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._limits = limits or ExchangeLimits()
        self._transport = transport
        self._clock = clock
        self._placement = placement
        self.observe: Callable[[int, NDArray[np.int64]], None] | None = None
        """Called with (layer, index_TK) of every exchange, where somebody wants to know what the gates choose."""

    @property
    def placement(self) -> Placement:
        return self._placement

    def update(self, placement: Placement) -> None:
        """Use `placement` from the next dispatch plan on, unless a newer one is known already."""
        if placement.epoch > self._placement.epoch:
            self._placement = placement
            self._transport.wake()

    def run(self, layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """Compute every chosen expert on its token's row.

        x_TH is on CPU; index_TK holds expert indices of `layer`. Returns rows_TKH on CPU in x's dtype, neither
        weighted nor summed. Raises ReplicaFailedError or DeadlineExceededError.
        """
        num_tokens, num_choices = index_TK.shape
        num_pairs = num_tokens * num_choices
        if num_tokens == 0:
            return x_TH.new_empty(0, num_choices, x_TH.shape[1])
        if self.observe is not None:
            self.observe(layer, index_TK.numpy())
        x = x_TH.contiguous()
        x_TB = x.view(torch.uint8).numpy()
        run = _Run(
            layer=layer,
            dtype=_DTYPE_NAMES[x.dtype],
            num_choices=num_choices,
            expert_P=index_TK.reshape(-1).numpy(),
            x_TB=x_TB,
            y_PB=np.empty((num_pairs, x_TB.shape[1]), np.uint8),
            todo=[_Todo(np.arange(num_pairs), frozenset())],
        )
        try:
            self._deliver(run)
        finally:
            for ticket in run.attempts:
                self._transport.forget(ticket)
        return torch.from_numpy(run.y_PB).view(x.dtype).view(num_tokens, num_choices, -1)

    def _deliver(self, run: _Run) -> None:
        """Send what is to do, take what comes, until every pair has its row."""
        deadline = self._clock.monotonic() + self._limits.timeout_s
        while True:
            placement = self._placement
            self._send(run, placement)
            if not run.attempts and not run.todo:
                return
            now = self._clock.monotonic()
            if now >= deadline:
                raise DeadlineExceededError(
                    f"the experts of layer {run.layer} did not answer within {self._limits.timeout_s:g} s",
                    deadline_s=self._limits.timeout_s,
                )
            until = min([deadline, *(attempt.deadline for attempt in run.attempts.values())])
            if run.todo:
                until = min(until, now + self._limits.retry_s)
            answers = self._transport.receive(until - now)
            for ticket, outcome in answers:
                self._take(run, run.attempts.pop(ticket), outcome)
            if not answers:
                # Either a new placement helps those that found no replica, or a host that failed them does after all:
                # its link may have broken for a moment only.
                run.todo = [_Todo(todo.pairs, frozenset()) for todo in run.todo]
                self._give_up_late(run)

    def _send(self, run: _Run, placement: Placement) -> None:
        """Plan what is to do and send it. What has no replica now stays to do."""
        waiting, run.todo = run.todo, []
        for todo in waiting:
            usable = placement.without(todo.failed) if todo.failed else placement
            try:
                parts = make_dispatch_plan(usable, run.layer, run.expert_P, run.num_choices, todo.pairs)
            except NoReadyReplicaError:
                run.todo.append(todo)
                continue
            deadline = self._clock.monotonic() + self._limits.attempt_timeout_s
            for part in parts:
                ticket = self._transport.send(part.host, _request(run, part))
                run.attempts[ticket] = _Attempt(part, todo.failed, deadline)

    def _take(self, run: _Run, attempt: _Attempt, outcome: object) -> None:
        """Keep a host's rows, or have its pairs sent elsewhere."""
        if isinstance(outcome, LayerReply):
            run.y_PB[attempt.part.pairs] = outcome.rows
        elif isinstance(outcome, ReplicaFailedError):
            raise outcome
        else:
            run.todo.append(attempt.again())

    def _give_up_late(self, run: _Run) -> None:
        """Take the pairs away from hosts that have had their time."""
        now = self._clock.monotonic()
        for ticket, attempt in list(run.attempts.items()):
            if now >= attempt.deadline:
                self._transport.forget(ticket)
                del run.attempts[ticket]
                run.todo.append(attempt.again())

    def close(self) -> None:
        """Break the connections. Idempotent; not while `run` runs."""
        self._transport.close()


def _request(run: _Run, part: HostPart) -> LayerRequest:
    all_rows = len(part.tokens) == len(run.x_TB)
    return LayerRequest(
        layer=run.layer,
        dtype=run.dtype,
        rows=run.x_TB if all_rows else run.x_TB[part.tokens],
        pair_rows=part.pair_rows,
        experts=part.experts,
        counts=part.counts,
    )
