"""The seam between the HTTP surface and the token plane: one Protocol, and the values that say what is served.

The surface above knows nothing of Ray, routers or hosts; whoever implements `Backend` knows nothing of HTTP or text.
The one invariant: closing an iterator of `generate` early cancels its request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from expertmesh.engine.api import GenerateRequest, PromptLogprobs, TokenEvent
from expertmesh.gates.spec import GateSpec

MeshView = Literal["hosts", "routers", "placement", "load", "decisions", "moves"]
MeshOrder = Literal["scale", "auto", "drain", "rebalance", "fault"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The one model that a gateway serves."""

    name: str
    """What clients write in `model`."""
    root: str
    """Where its weights come from: a folder or a hub id."""
    max_context: int
    """Prompt plus generated tokens of one request, at most."""
    vocab_size: int
    """Token ids are 0 to this, exclusive."""
    created: int
    """Seconds since the Unix epoch."""
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one HTTP request may cost the gateway before the token plane hears of it."""

    max_header_bytes: int = 32 * 1024
    max_body_bytes: int = 16 * 1024 * 1024
    body_timeout_s: float = 30.0
    """For all of a body to come."""
    max_choices: int = 1024
    """Prompts times `n`."""


class Backend(Protocol):
    """The token plane as the gateway sees it. Its errors are those of `expertmesh.errors`."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """Continue one sequence. Tokens that are ready together come in one list, which is empty when all there is to
        say is that work goes on; the last event has a `finish_reason`. `aclose` before that cancels the request.

        Raises OverloadedError when too much is waiting, NoReadyReplicaError and DeadlineExceededError as the mesh does;
        RouterGoneError when who had the request ended, or cannot be reached.
        """
        ...

    async def score(
        self, prompt_ids: tuple[int, ...], top_logprobs: int, gate: GateSpec | None = None
    ) -> PromptLogprobs:
        """Log-probabilities of a prompt's own tokens, by the model's gate or another."""
        ...

    def trace(self, seconds: float) -> AsyncGenerator[bytes, None]:
        """Record what the gates of one router choose, for so long: a trace's bytes as they come."""
        ...

    async def mesh(self, what: MeshView) -> Any:
        """The mesh as JSON-able data."""
        ...

    async def order(self, what: MeshOrder, values: dict[str, Any]) -> Any:
        """Ask the controller for a change. Raises ConfigError when it cannot be, BusyError when not just now."""
        ...

    async def healthy(self) -> bool:
        """Whether a request sent now could be answered."""
        ...
