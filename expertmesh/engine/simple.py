"""The simple engine's batch: prompts of equal length run together, with the model's own cache.

For models that the paged cache cannot hold: recurrent states, latent attention, layers of unlike shape. Owns the groups.
Does not know what the cache holds. Invariant: the rows of a group have the same number of tokens at every step, so
nothing is ever padded, which is exact for every architecture.
"""

from __future__ import annotations

import inspect
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from expertmesh.engine.sampling import choose_tokens

if TYPE_CHECKING:
    from expertmesh.engine.batch import Generation
    from expertmesh.engine.config import EngineConfig
    from expertmesh.engine.sampling import Choice


class SimpleBatch:
    """A `Batch` of groups that take turns, one forward each."""

    def __init__(self, model: Any, config: EngineConfig) -> None:
        self._model = model
        self._config = config
        self._waiting: deque[Generation] = deque()
        self._added: set[Generation] = set()
        self._groups: deque[_Group] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def has_room(self, generation: Generation) -> bool:
        kv_tokens = generation.kv_tokens + sum(other.kv_tokens for other in self._added)
        return len(self._added) < self._config.max_requests and kv_tokens <= self._config.kv_tokens

    def add(self, generation: Generation) -> None:
        self._added.add(generation)
        self._waiting.append(generation)

    def remove(self, generation: Generation) -> None:
        self._added.discard(generation)
        if generation in self._waiting:
            self._waiting.remove(generation)

    def schedule(self) -> list[Generation]:
        self._form_groups()
        while self._groups:
            group = self._groups.popleft()
            group.keep(self._added)
            if scheduled := group.generations:
                self._groups.append(group)
                return scheduled
        return []

    def run(self) -> list[tuple[Generation, Choice | None]]:
        return self._groups[-1].step(self._model)

    def close(self) -> None:
        self._waiting.clear()
        self._added.clear()
        self._groups.clear()

    def _form_groups(self) -> None:
        by_length: dict[int, list[Generation]] = {}
        for generation in self._waiting:
            by_length.setdefault(len(generation.request.prompt_ids), []).append(generation)
        self._waiting.clear()
        for length, generations in by_length.items():
            size = max(1, self._config.max_batch_tokens // length)
            for start in range(0, len(generations), size):
                self._groups.append(_Group(generations[start : start + size]))


class _Group:
    """Generations with the same number of tokens, and their cache. R rows, L tokens, V vocabulary."""

    def __init__(self, generations: list[Generation]) -> None:
        self._rows: list[Generation | None] = list(generations)
        """None marks a row that left but whose cache could not be dropped: it is computed and ignored."""
        self._cache: Any = None
        self._num_cached = 0

    @property
    def generations(self) -> list[Generation]:
        return [row for row in self._rows if row is not None]

    def keep(self, live: set[Generation]) -> None:
        """Forget the rows that are not live, and their cache where that can be done."""
        kept = [index for index, row in enumerate(self._rows) if row in live]
        if len(kept) == len(self._rows):
            return
        if self._cache is None:
            self._rows = [self._rows[index] for index in kept]
        elif kept and _can_select_rows(self._cache):
            self._rows = [self._rows[index] for index in kept]
            self._cache.reorder_cache(torch.tensor(kept))
        else:
            self._rows = [row if row in live else None for row in self._rows]

    def step(self, model: Any) -> list[tuple[Generation, Choice | None]]:
        if self._cache is None:
            tokens = [list(generation.request.prompt_ids) for generation in self.generations]
        else:
            tokens = [[0 if row is None else row.last_token_id] for row in self._rows]
        input_ids_RL = torch.tensor(tokens, device=model.device)
        num_tokens = self._num_cached + input_ids_RL.shape[1]
        ...
