"""What the engine's thread works on: one request's life, and the interface of the two batches.

Owns the one rule by which a request ends. Does not know threads, models or caches. Invariant: a generation's events are
its choices in order, the last of them with a finish reason.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from expertmesh.engine.api import FINISH_LENGTH, FINISH_STOP, GenerateRequest, TokenEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from expertmesh.engine.sampling import Choice, SamplingState
    from expertmesh.gates.spec import GateSpec


@dataclass(slots=True, kw_only=True, eq=False)
class Generation:
    """One request while it waits or runs. Compared by identity: a request id may be used again once it is cancelled."""

    key: str
    """Unique in this engine for ever."""
    request: GenerateRequest
    on_event: Callable[[TokenEvent], object]
    sampling: SamplingState

    @property
    def kv_tokens(self) -> int:
        """Tokens of cache that this generation can come to need."""
        return len(self.request.prompt_ids) - self.request.num_resumed + self.request.sampling.max_tokens

    def accept(self, choice: Choice) -> TokenEvent:
        """Take the chosen token as the next one, and say whether it ends the request."""
        self.sampling.append(choice.token_id)
        finish_reason = None
        if choice.token_id in self.sampling.stop_ids:
            finish_reason = FINISH_STOP
        elif self.sampling.num_generated >= self.request.sampling.max_tokens:
            finish_reason = FINISH_LENGTH
        return TokenEvent(
            request_id=self.request.request_id,
            token_id=choice.token_id,
            logprob=choice.logprob,
            top_logprobs=choice.top_logprobs,
            finish_reason=finish_reason,
        )


class RowGates(Protocol):
    """The gates of the model, as far as they can be changed: see `expertmesh.backbone.gating`."""

    def check(self, spec: GateSpec) -> None:
        """Raise ConfigError where the model cannot use this gate. May be called from any thread."""
        ...

    def by_row(self, rows: Sequence[tuple[GateSpec | None, int]]) -> AbstractContextManager[None]:
        """For one forward: which gate so many rows use, in their order; None is what they use without being told."""
        ...


def gates_set(gates: RowGates | None, rows: Sequence[tuple[GateSpec | None, int]]) -> AbstractContextManager[None]:
    """The gates of one forward. Where no row asks for one, nothing is touched."""
    if all(gate is None for gate, _ in rows):
        return nullcontext()
    assert gates is not None, "a request with a gate was taken that nothing can set"
    return gates.by_row(rows)


class Batch(Protocol):
    """Generations that share a model and a cache. Used from the engine's thread only, but for `num_waiting`.

    One step is `schedule` and then `run`, so that when a forward raises the caller knows whom it was for.
    """

    @property
    def num_waiting(self) -> int:
        """Generations that were added and hold no cache yet. May be read from any thread."""
        ...

    def has_room(self, generation: Generation) -> bool: ...

    def add(self, generation: Generation) -> None: ...

    def remove(self, generation: Generation) -> None:
        """Free what it holds: it finished, failed or was cancelled. Removing it again does nothing."""
        ...

    def schedule(self) -> list[Generation]:
        """Fix whose tokens the next forward computes. Empty only if nothing was added that is not removed."""
        ...

    def run(self) -> list[tuple[Generation, Choice | None]]:
        """Run that forward, and choose a token for each generation whose prompt is complete.

        None stands for logits that were not finite. Raises whatever the forward raises; every generation that was
        scheduled must then be removed.
        """
        ...

    def close(self) -> None:
        """Give the memory back and leave the model as it was found."""
        ...
