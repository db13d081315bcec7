"""What one exchange knows while it is under way, as values: its pairs, who computes them, who has failed them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from expertmesh.moe.loops import address, loops
from expertmesh.transport import LayerRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from expertmesh.errors import ReplicaFailedError
    from expertmesh.ids import HostId
    from expertmesh.moe.dispatch import HostPart

_KEEP = {"float32": ("keep_32", 0x7F800000), "bfloat16": ("keep_16", 0x7F80), "float16": ("keep_16", 0x7C00)}
"""By dtype, how rows are kept, and the bits that are set in infinities and NaNs, and in no other numbers."""
NOBODY: frozenset[HostId] = frozenset()
NEVER = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeLimits:
    """How long an exchange may take, and what it may spend on being sure."""

    timeout_s: float = 60.0
    """For the whole exchange, waiting for a replica included."""
    attempt_timeout_s: float = 20.0
    """For one host's answer, at most; after it, the rows go to another replica, or once more to the only one."""
    attempt_least_s: float = 0.25
    """And at least. Between the two, it is `attempt_factor` times what would be late."""
    attempt_factor: float = 10.0
    retry_s: float = 0.1
    """When no replica is left to ask: how long to wait for a new placement before asking all of them again."""
    retries: float = NEVER
    """And how often, at most, before it gives up: where no other replica can come, waiting is of no use."""
    hedge_share: float = 0.05
    """Of all requests to hosts, how many may be sent in vain to a second one as well because the first is late."""
    hedges_saved: float = 8.0
    """So many of them may come at once."""
    double_check_share: float = 0.0
    """Of all requests to hosts, how many are computed by a second one as well, to compare."""
    doubt_s: float = 2.0
    """A replica that alone says for so long that a row is not finite is believed."""


@dataclass(slots=True)
class ExchangeCounts:
    """What has happened, since the start."""

    requests: int = 0
    hedges: int = 0
    """Requests sent to a second host because the first was late."""
    overtaken: int = 0
    """Of these, how often the second was faster."""
    sent_again: int = 0
    """Requests whose host broke off, failed, or did not answer in time."""
    not_finite: int = 0
    """Replies with NaN or infinities in them."""
    double_checked: int = 0


class Todo(NamedTuple):
    """Pairs that nobody is computing at the moment."""

    pairs: NDArray[np.int64]
    failed: frozenset[HostId] = NOBODY
    """Hosts that have failed them."""
    error: ReplicaFailedError | None = None
    """What the last of these said, if it said so: raised when no other is left."""


class Attempt(NamedTuple):
    """A part that a host was asked for."""

    part: HostPart
    failed: frozenset[HostId]
    """Hosts that have failed its pairs before."""
    sent_at: float
    late_at: float
    """When another host is to be asked as well."""
    deadline: float
    """When its pairs are sent again, whoever can be asked. An answer still counts."""

    @property
    def failed_with_it(self) -> frozenset[HostId]:
        return self.failed | {self.part.host.id}


@dataclass(slots=True)
class Run:
    """One exchange under way. T tokens, K experts per token, P pairs, B bytes per row."""

    layer: int
    dtype: str
    num_choices: int
    expert_P: NDArray[np.int64]
    x_TB: NDArray[np.uint8]
    y_TKH: torch.Tensor
    todo: list[Todo]
    num_left: int
    """Pairs that have no row yet."""
    deadline: float
    """When the exchange fails."""
    attempts: dict[int, Attempt] = field(default_factory=dict)
    """By the ticket of the request."""
    done_P: NDArray[np.bool_] | None = None
    """The pairs that have their row; not kept before two hosts compute the same pair."""
    next_look_at: float = NEVER
    """No attempt needs a look before."""
    waiting: list[Todo] = field(default_factory=list)
    """What found no replica."""
    retry_at: float = NEVER
    """When that is to look again, among all."""
    retries: int = 0
    """How often all were asked again because none was left."""
    patience: float = 1.0
    """Grows each time that a host has had its time: where all are slow, asking ever again would make them slower."""
    not_finite: dict[int, dict[HostId, float]] = field(default_factory=dict)
    """Pairs whose row came back with NaN or infinities: from whom, and when first."""

    def request(self, part: HostPart, *, copy: bool = False) -> LayerRequest:
        """What the host of a part is asked for; with `copy`, its rows outlive the exchange."""
        all_rows = len(part.tokens) == len(self.x_TB) and not copy
        return LayerRequest(
            layer=self.layer,
            dtype=self.dtype,
            rows=self.x_TB if all_rows else self.x_TB[part.tokens],
            pair_rows=part.pair_rows,
            experts=part.experts,
            counts=part.counts,
        )

    def shift(self, seconds: float) -> None:
        """Let so much time not count, in which nobody looked for answers."""
        self.deadline += seconds
        self.next_look_at += seconds
        self.attempts = {
            ticket: attempt._replace(late_at=attempt.late_at + seconds, deadline=attempt.deadline + seconds)
            for ticket, attempt in self.attempts.items()
        }

    def watch_pairs(self) -> None:
        """Keep account of each pair from now on, for two hosts may compute the same one."""
        if self.done_P is None:
            self.done_P = np.ones(len(self.expert_P), np.bool_)
            for todo in (*self.todo, *self.waiting):
                self.done_P[todo.pairs] = False
            for attempt in self.attempts.values():
                self.done_P[attempt.part.pairs] = False

    def keep_finite(self, pairs: NDArray[np.int64], rows: NDArray[np.uint8]) -> bool:
        """Take the rows of pairs that only one host was asked for, unless NaN or an infinity is in any."""
        if self.done_P is not None:
            return False
        keep, special = _KEEP[self.dtype]
        hidden = self.y_TKH.shape[-1]
        has_special = getattr(loops(), keep)(
            len(pairs), hidden, special, address(rows), address(pairs), self.y_TKH.data_ptr()
        )
        if not has_special:
            self.num_left -= len(pairs)
        return not has_special

    def keep(self, pairs: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
        """Take the rows of pairs that have none yet."""
        if self.done_P is not None:
            is_new_P = ~self.done_P[pairs]
            pairs, rows = pairs[is_new_P], rows[is_new_P]
            self.done_P[pairs] = True
        self.y_TKH.view(torch.uint8).numpy().reshape(len(self.expert_P), -1)[pairs] = rows
        self.num_left -= len(pairs)

    def do_again(self, attempt: Attempt, error: ReplicaFailedError | None = None) -> None:
        """Have an attempt's pairs computed by another host, but for those that are done or being taken care of."""
        pairs = attempt.part.pairs
        if self.done_P is not None:
            is_open_P = ~self.done_P
            for other in (*self.todo, *self.waiting):
                is_open_P[other.pairs] = False
            for under_way in self.attempts.values():
                if under_way.deadline < NEVER:
                    is_open_P[under_way.part.pairs] = False
            pairs = pairs[is_open_P[pairs]]
        if len(pairs):
            self.todo.append(Todo(pairs, attempt.failed_with_it, error))
