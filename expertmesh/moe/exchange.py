"""The exchange: one scatter and gather of one layer, and the only retry loop of the token plane.

Owns the current placement and the transport. Its promise: every pair's result row comes back exactly once, computed
by *some* ready replica, or the exchange raises; a missing expert is never silently dropped, and a row that is late,
lost, or not finite is asked of another replica. Which one answers makes no difference to the answer.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch

from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.errors import DeadlineExceededError, NoReadyReplicaError, ReplicaFailedError, ReplicaUnavailableError
from expertmesh.ids import ExpertId
from expertmesh.kernels.spec import DTYPES
from expertmesh.moe.asides import Asides
from expertmesh.moe.checks import Checks
from expertmesh.moe.dispatch import all_pairs, make_dispatch_plan
from expertmesh.moe.finite import not_finite
from expertmesh.moe.health import Health
from expertmesh.moe.run import NEVER, Attempt, ExchangeCounts, ExchangeLimits, Run, Todo
from expertmesh.transport import LayerReply

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from expertmesh.clock import Clock
    from expertmesh.doubt import Doubt
    from expertmesh.ids import HostId
    from expertmesh.moe.asides import Then
    from expertmesh.moe.dispatch import HostPart
    from expertmesh.moe.health import HealthOptions
    from expertmesh.placement import Placement
    from expertmesh.transport import Transport

__all__ = ["Exchange", "ExchangeCounts", "ExchangeLimits"]

_DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}


class Exchange:
    """Sends token rows to the hosts that hold their experts. One caller at a time; `update` from any thread."""

    def __init__(
        self,
        transport: Transport,
        placement: Placement,
        limits: ExchangeLimits | None = None,
        clock: Clock = SYSTEM_CLOCK,
        health: HealthOptions | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._limits = limits or ExchangeLimits()
        self._transport = transport
        self._clock = clock
        self._placement = placement
        self._health = Health(health)
        self._asides = Asides(transport)
        self._hedges = self._limits.hedges_saved
        self._met: Placement | None = None
        self._under_way: Run | None = None
        self.counts = ExchangeCounts()
        rng = rng or random.Random(0)  # which rows are computed twice is no secret
        self._checks = Checks(transport, self._asides, self._health, self._limits, self.counts, clock, rng)
        self.observe: Callable[[int, NDArray[np.int64]], None] | None = None
        """Called with (layer, index_TK) of every exchange, where somebody wants to know what the gates choose."""

    @property
    def placement(self) -> Placement:
        return self._placement

    @property
    def avoided(self) -> frozenset[HostId]:
        """The hosts that are not trusted now: they get only rows that no other can compute."""
        return self._health.avoided

    def on_doubt(self, tell: Callable[[Doubt], object]) -> None:
        """Have `tell` called with every doubt about a replica, on the thread that runs the exchange."""
        self._checks.on_doubt = tell

    def update(self, placement: Placement) -> None:
        """Use `placement` from the next dispatch plan on, unless a newer one is known already."""
        if placement.epoch > self._placement.epoch:
            self._placement = placement
            self._transport.wake()

    def run(self, layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """Compute every chosen expert on its token's row.

        x_TH is on CPU; index_TK holds expert indices of `layer`, or NO_EXPERT, whose pairs do not travel. Returns
        rows_TKH on CPU in x's dtype, neither weighted nor summed; the row of no expert is zero. Raises
        ReplicaFailedError or DeadlineExceededError; with a limit to `retries` also NoReadyReplicaError.
        """
        return self._finish(self._start(layer, x_TH, index_TK))

    def begin(self, layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor) -> Callable[[], torch.Tensor]:
        """As `run`, in two steps: send the rows, and with the function returned wait for what comes back.

        In between the caller may do something else, and hosts are not blamed for that time. x_TH must not change. If
        another exchange starts first, this one is given up.
        """
        run = self._start(layer, x_TH, index_TK)
        try:
            left_at = self._turn(run, self._clock.monotonic(), look_only=True)
        except BaseException:
            self._end(run)
            raise
        self._asides.run_ended(left_at)

        def finish() -> torch.Tensor:
            if self._under_way is not run:
                raise RuntimeError("another exchange has begun since")
            run.shift(self._clock.monotonic() - left_at)
            return self._finish(run)

        return finish

    def _start(self, layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor) -> Run:
        if self._under_way is not None:
            self._end(self._under_way)
        num_tokens, num_choices = index_TK.shape
        num_pairs = num_tokens * num_choices
        if self.observe is not None and num_pairs:
            self.observe(layer, index_TK.numpy())
        x = x_TH.contiguous()
        y_TKH = torch.empty((num_tokens, num_choices, x.shape[1]), dtype=x.dtype)
        expert_P = index_TK.numpy().reshape(-1).astype(np.int64, copy=False)
        pairs = all_pairs(num_pairs)
        if num_pairs and expert_P.min() < 0:
            y_TKH.zero_()
            pairs = np.flatnonzero(expert_P >= 0)
        now = self._clock.monotonic()
        run = Run(
            layer=layer,
            dtype=_DTYPE_NAMES[x.dtype],
            num_choices=num_choices,
            expert_P=expert_P,
            x_TB=x.view(torch.uint8).numpy(),
            y_TKH=y_TKH,
            todo=[Todo(pairs)] if len(pairs) else [],
            num_left=len(pairs),
            deadline=now + self._limits.timeout_s,
        )
        self._under_way = run
        self._meet_hosts()
        if self._health.avoided:
            self._checks.probe(run, self._placement, now)
        return run

    def _finish(self, run: Run) -> torch.Tensor:
        """Take turns until every pair has its row."""
        try:
            now = self._clock.monotonic()
            while run.num_left:
                now = self._turn(run, now)
        finally:
            self._end(run)
        return run.y_TKH

    def _end(self, run: Run) -> None:
        for ticket in run.attempts:
            self._transport.forget(ticket)
        run.attempts.clear()
        if self._asides:
            self._asides.run_ended(self._clock.monotonic())
        self._under_way = None

    def _turn(self, run: Run, now: float, *, look_only: bool = False) -> float:
        """Send what is to do and take what comes, waiting for it unless told to look only: what time it is then."""
        epoch = self._placement.epoch
        self._send(run, now)
        if now >= run.deadline:
            raise DeadlineExceededError(
                f"the experts of layer {run.layer} did not answer within {self._limits.timeout_s:g} s",
                deadline_s=self._limits.timeout_s,
            )
        until = now if look_only else min(run.deadline, run.next_look_at, run.retry_at)
        answers = self._transport.receive(until - now)
        now = self._clock.monotonic()
        for ticket, outcome in answers:
            attempt = run.attempts.pop(ticket, None)
            if attempt is None:
                self._asides.take(ticket, outcome, now)
            else:
                self._take(run, attempt, outcome, now)
        if not run.num_left or look_only:
            return now
        if now >= run.next_look_at:
            self._look_after_late(run, now)
        if now >= run.retry_at or (run.waiting and self._placement.epoch != epoch):
            # Either a new placement helps those that found no replica, or a host that failed them does after all: its
            # link may have broken for a moment only.
            run.retries += 1
            if run.retries > self._limits.retries:
                raise NoReadyReplicaError(ExpertId(run.layer, int(run.expert_P[run.waiting[0].pairs[0]])))
            run.todo += [Todo(todo.pairs) for todo in run.waiting]
            run.waiting, run.retry_at = [], NEVER
        return now

    def _meet_hosts(self) -> None:
        """Forget what is known of hosts that a newer placement has no more."""
        if self._met is not self._placement:
            self._met = self._placement
            self._health.keep_only({host.id for host in self._met.hosts})

    # --- sending -----------------------------------------------------------------------------------------------------

    def _send(self, run: Run, now: float) -> None:
        """Plan what is to do and send it. What has no replica now waits."""
        while run.todo:
            todo = run.todo.pop()
            try:
                parts = self._plan(run, self._placement, todo)
            except NoReadyReplicaError:
                if todo.error is not None:
                    raise todo.error from None
                run.waiting.append(todo)
                run.retry_at = min(run.retry_at, now + self._limits.retry_s)
            else:
                self._send_parts(run, parts, todo.failed, now)

    def _plan(self, run: Run, placement: Placement, todo: Todo) -> list[HostPart]:
        return make_dispatch_plan(
            placement,
            run.layer,
            run.expert_P,
            run.num_choices,
            todo.pairs,
            failed=todo.failed,
            avoided=self._health.avoided,
        )

    def _send_parts(self, run: Run, parts: list[HostPart], failed: frozenset[HostId], now: float) -> None:
        limits = self._limits
        for part in parts:
            ticket = self._transport.send(part.host, run.request(part))
            late_s = self._health.late_after_s(part.host.id, len(part.pairs))
            enough_s = max(limits.attempt_least_s, limits.attempt_factor * late_s)
            deadline = now + run.patience * min(limits.attempt_timeout_s, enough_s)
            run.attempts[ticket] = Attempt(part, failed, now, now + late_s, deadline)
            run.next_look_at = min(run.next_look_at, now + late_s, deadline)
        self.counts.requests += len(parts)
        self._hedges = min(self._limits.hedges_saved, self._hedges + self._limits.hedge_share * len(parts))

    # --- receiving ---------------------------------------------------------------------------------------------------

    def _take(self, run: Run, attempt: Attempt, outcome: object, now: float) -> None:
        """Keep a host's rows, or have its pairs sent elsewhere."""
        host = attempt.part.host.id
        if not isinstance(outcome, LayerReply):
            self.counts.sent_again += 1
            if not (isinstance(outcome, ReplicaUnavailableError) and outcome.is_alive):
                self._health.broke(host, now)
            run.do_again(attempt, outcome if isinstance(outcome, ReplicaFailedError) else None)
            return
        pairs, rows = attempt.part.pairs, outcome.rows
        self._health.answered(host, len(pairs), now - attempt.sent_at, now)
        if run.keep_finite(pairs, rows):
            self._checks.maybe_ask_twice(run, self._placement, attempt, rows, now)
            return
        rows = rows.copy()
        if (is_bad_P := not_finite(rows, run.dtype)) is not None:
            again_P = self._checks.to_do_again(run, attempt, is_bad_P, now)
            if again_P.any():
                run.todo.append(Todo(pairs[again_P], attempt.failed_with_it))
                pairs, rows = pairs[~again_P], rows[~again_P]
        else:
            self._checks.maybe_ask_twice(run, self._placement, attempt, rows, now)
        run.keep(pairs, rows)
        self._set_aside_overtaken(run, now)

    # --- the late ----------------------------------------------------------------------------------------------------

    def _look_after_late(self, run: Run, now: float) -> None:
        """Have pairs whose host is late computed by another as well, and ask again where a host has had its time."""
        run.next_look_at = NEVER
        for ticket, attempt in list(run.attempts.items()):
            if now >= attempt.deadline:
                self.counts.sent_again += 1
                self._health.missed(attempt.part.host.id, now)
                run.patience *= 2
                run.watch_pairs()
                run.attempts[ticket] = attempt._replace(late_at=NEVER, deadline=NEVER)
                run.do_again(attempt)
            elif now >= attempt.late_at:
                run.attempts[ticket] = attempt._replace(late_at=NEVER)
                self._hedge(run, attempt, now)
            run.next_look_at = min(run.next_look_at, run.attempts[ticket].late_at, run.attempts[ticket].deadline)

    def _hedge(self, run: Run, attempt: Attempt, now: float) -> None:
        """Ask others for what they can compute of an attempt, if there is budget."""
        placement, failed = self._placement, attempt.failed_with_it
        pairs = attempt.part.pairs
        has_other_E = placement.table(run.layer, failed).num_replicas_E > 0
        pairs = pairs[has_other_E[run.expert_P[pairs]]]
        if self._hedges < 1 or not len(pairs):
            return
        run.watch_pairs()
        parts = self._plan(run, placement, Todo(pairs, failed))
        self._hedges -= 1
        self.counts.hedges += len(parts)
        self._send_parts(run, parts, failed, now)

    def _set_aside_overtaken(self, run: Run, now: float) -> None:
        """Wait no longer for those whose pairs others have computed."""
        if run.done_P is None:
            return
        for ticket, attempt in list(run.attempts.items()):
            if run.done_P[attempt.part.pairs].all():
                del run.attempts[ticket]
                if attempt.late_at == NEVER:
                    self.counts.overtaken += 1
                    self._hedges = min(self._limits.hedges_saved, self._hedges + 1)  # it was worth it
                    self._health.missed(attempt.part.host.id, now)
                learn = self._learn(attempt.part.host.id, len(attempt.part.pairs))
                self._asides.watch(ticket, attempt.sent_at, self._limits.attempt_timeout_s, learn)

    def _learn(self, host: HostId, num_pairs: int) -> Then:
        """What to do when one that was overtaken answers after all."""

        def learn(reply: LayerReply | None, took_s: float) -> None:
            if reply is not None:
                self._health.answered(host, num_pairs, took_s, self._clock.monotonic())

        return learn

    def close(self) -> None:
        """Break the connections. Idempotent; not while `run` runs."""
        self._transport.close()
