"""How long a run is: so many tokens, or so many minutes turned into tokens on the way.

Owns the end of a run. Does not know what a step does. Invariant: every run ends with a number of tokens which, given
from the start, gives the same sequence of batches and learning rates again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from expertmesh.clock import Clock
    from expertmesh.train.loop import Schedule


class Budget(Protocol):
    """Says how many tokens a run has."""

    def tokens(self, seen: int) -> int | None:
        """Return the number, or None while it is open; asked before each step, with the tokens seen until then."""
        ...


class TokenBudget:
    """A number of tokens that is known from the start."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def tokens(self, seen: int) -> int:
        return self._tokens


class TimeBudget:
    """Minutes. The number of tokens is set when the time before the decay of the learning rate is over.

    The decay takes the rest of the minutes if the machine stays as fast as it was, and is never cut short.
    """

    def __init__(self, minutes: float, *, schedule: Schedule, clock: Clock) -> None:
        self._tokens: int | None = None
        self._schedule = schedule
        self._clock = clock
        self._decay_at_s = clock.monotonic() + 60 * minutes * (1 - schedule.decay_share)

    def tokens(self, seen: int) -> int | None:
        if self._tokens is None and seen > 0 and self._clock.monotonic() >= self._decay_at_s:
            self._tokens = self._schedule.budget_to_decay_from(seen)
        return self._tokens
