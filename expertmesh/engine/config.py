"""An engine's limits. Values only; no torch.

Owns the relations that must hold between them. Does not know the model: whether a cache of this size fits the machine
is found out when the engine is built.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from expertmesh.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much an engine may hold at once. Raises ConfigError when the limits contradict each other."""

    max_requests: int
    """Requests that run at once; the others wait."""
    max_context: int
    """Prompt plus generated tokens of one request, at most."""
    max_batch_tokens: int
    """Tokens of one forward, at most. Continuous batching splits longer prompts; the simple engine, which cannot, runs
    such a prompt alone."""
    max_queue: int
    """Requests that may wait; one more is refused."""
    kv_tokens: int
    """Tokens of all running requests whose keys and values are kept."""
    page_size: int = 256
    """Tokens in one page of the paged cache, and so the grain at which prompts share a prefix. Flash attention's fast
    decoding needs a multiple of 256; other attention takes 4 or more."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ConfigError(f"{field.name} is {value}; it must be at least 1")
        if self.page_size < 4:
            raise ConfigError(f"page_size is {self.page_size}; it must be at least 4")
        if self.kv_tokens < self.max_context:
            raise ConfigError(
                f"kv_tokens is {self.kv_tokens}, less than max_context ({self.max_context}); raise it so "
                "that one request of full length fits"
            )
        if self.max_batch_tokens < self.max_requests:
            raise ConfigError(
                f"max_batch_tokens is {self.max_batch_tokens}, less than max_requests "
                f"({self.max_requests}); raise it so that every running request can decode in one forward"
            )
