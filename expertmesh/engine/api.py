"""What an engine is: many requests in, one event per token out. Values and one Protocol; no torch.

An engine knows token ids only: text, stop strings and chat templates are the gateway's. It runs the model in a thread
of its own and calls back from that thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from expertmesh.errors import ExpertMeshError
    from expertmesh.gates.spec import GateSpec

FINISH_STOP = "stop"
"""The model ended the text: an end-of-sequence token or one of `stop_token_ids`."""
FINISH_LENGTH = "length"
"""`max_tokens` or the context's end was reached."""
FINISH_ERROR = "error"
"""The request failed; the event's `error` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request picks its tokens. Every field has the meaning that vLLM and the OpenAI API give it.

    The choice is a pure function of (logits, seed, position): noise comes from a counter-based generator keyed by
    them, never from state, so a request that is resumed elsewhere goes on exactly as it would have.
    """

    max_tokens: int
    temperature: float = 1.0
    """0 means greedy: seed, top_p, top_k and min_p then change nothing."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    """End-of-sequence and stop tokens cannot be chosen before this many tokens."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    """None reports no log-probabilities; n >= 0 the chosen token's and those of the n most likely tokens. They are
    of the model's own distribution: before temperature, penalties and bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One sequence to continue.

    To resume a request elsewhere, put the tokens generated so far at the end of `prompt_ids` and their number in
    `num_resumed`, and change nothing else: positions, noise, penalties, `min_tokens` and `max_tokens` (of the whole
    answer, as before) then count as if nothing had happened.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    num_resumed: int = 0
    gate: GateSpec | None = None
    """For this request's tokens, in place of the gate that the others have. Never one that looks at the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One generated token, or the end of a request, or both.

    The last event of a request has a `finish_reason`, and nothing follows it. `token_id` is None only on an end that
    brings no token (an error).
    """

    request_id: str
    token_id: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first."""
    finish_reason: str | None = None
    error: str | None = None
    cause: ExpertMeshError | None = None
    """The typed error behind `error`, where it is one of ours: it tells a client whether to retry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Log-probabilities of a prompt's own tokens: entry i is of token i given tokens before it; entry 0 is None."""

    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    """Empty for entry 0. Each holds the arg-max; the chosen token's own value is the identical float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """A snapshot for metrics."""

    running: int
    waiting: int
    generated_tokens: int
    steps: int


class Engine(Protocol):
    """Runs many requests at once. Thread-safe."""

    @property
    def max_context(self) -> int:
        """Prompt plus generated tokens of one request, at most."""
        ...

    def submit(self, request: GenerateRequest, on_event: Callable[[TokenEvent], object]) -> None:
        """Queue a request. `on_event` is called from the engine's thread; it must return at once and not raise.

        One that is resumed goes ahead of those that wait, and is never refused for their number.
        Raises OverloadedError when the queue is full, InvalidRequestError when prompt plus max_tokens cannot fit or the
        gate does not fit the model, RouterGoneError when the engine has stopped.
        """
        ...

    def after_events(self, tell: Callable[[], object]) -> None:
        """Have `tell` called on the engine's thread after a step's events. It must return at once and not raise."""
        ...

    def cancel(self, request_id: str) -> None:
        """Forget a request: no event follows, its memory is freed by the next step. Unknown ids are ignored."""
        ...

    def score(self, prompt_ids: tuple[int, ...], top_logprobs: int, gate: GateSpec | None = None) -> PromptLogprobs:
        """Run the model over a prompt, for `echo` with `logprobs`. Blocks; call it off the event loop."""
        ...

    def statistics(self) -> EngineStatistics: ...

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread runs. Once False it stays so: make a new engine, or a new process."""
        ...

    def wait_end(self) -> None:
        """Block until the engine's thread has ended, by `close` or by itself."""
        ...

    def close(self) -> None:
        """Fail what is still running, stop the thread and free the memory. Idempotent."""
        ...
