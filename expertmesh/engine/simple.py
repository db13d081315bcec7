"""The simple engine's batch: prompts of equal length run together, with the model's own cache.

For models that the paged cache cannot hold: recurrent states, latent attention, layers of unlike shape, an encoder.
Owns the groups. Does not know what the cache holds. Invariant: the rows of a group have the same number of tokens at
every step, so nothing is ever padded, which is exact for every architecture.

An encoder reads the prompt, and the decoder begins with tokens of the model's own and writes the answer.
"""

from __future__ import annotations

import inspect
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import DynamicCache

from expertmesh.engine.batch import gates_set
from expertmesh.engine.sampling import choose_tokens
from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertmesh.engine.api import GenerateRequest
    from expertmesh.engine.batch import Generation, RowGates
    from expertmesh.engine.config import EngineConfig
    from expertmesh.engine.sampling import Choice
    from expertmesh.gates.spec import GateSpec


class SimpleBatch:
    """A `Batch` of groups that take turns, one forward each."""

    def __init__(self, model: Any, config: EngineConfig, gates: RowGates | None = None) -> None:
        self._model = model
        self._gates = gates
        self._config = config
        self._start_ids = _decoder_start_ids(model)
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
        self._groups = deque(group for group in self._groups if any(row in self._added for row in group.generations))

    def schedule(self) -> list[Generation]:
        self._form_groups()
        if not self._groups:
            return []
        self._groups.rotate(-1)
        self._groups[-1].keep(self._added)
        return self._groups[-1].generations

    def run(self) -> list[tuple[Generation, Choice | None]]:
        group = self._groups[-1]
        with gates_set(self._gates, group.gates):
            return group.step(self._model)

    def close(self) -> None:
        self._waiting.clear()
        self._added.clear()
        self._groups.clear()

    def _form_groups(self) -> None:
        by_length: dict[tuple[int, int], list[tuple[Generation, _Input]]] = {}
        for generation in self._waiting:
            given = _split_input(generation.request, self._start_ids)
            lengths = len(given.encoder_ids), len(given.decoder_ids)
            by_length.setdefault(lengths, []).append((generation, given))
        self._waiting.clear()
        for lengths, members in by_length.items():
            size = max(1, self._config.max_batch_tokens // max(lengths))
            for start in range(0, len(members), size):
                self._groups.append(_Group(members[start : start + size]))


class _Input(NamedTuple):
    """What a request's model reads before it writes the next token."""

    encoder_ids: tuple[int, ...]
    """() without an encoder."""
    decoder_ids: tuple[int, ...]


def _split_input(request: GenerateRequest, start_ids: tuple[int, ...] | None) -> _Input:
    if start_ids is None:
        return _Input((), request.prompt_ids)
    num_prompt = len(request.prompt_ids) - request.num_resumed
    return _Input(request.prompt_ids[:num_prompt], start_ids + request.prompt_ids[num_prompt:])


def _decoder_start_ids(model: Any) -> tuple[int, ...] | None:
    """What a decoder begins with: its start token and, in translation, the target language. None without an encoder."""
    if not model.config.is_encoder_decoder:
        return None
    start, language = (
        next(
            (id_ for of in (model.generation_config, model.config) if (id_ := getattr(of, name, None)) is not None),
            None,
        )
        for name in ("decoder_start_token_id", "forced_bos_token_id")
    )
    if start is None:
        raise ConfigError("generation_config.json: it has no decoder_start_token_id, with which the decoder begins")
    return (start,) if language is None else (start, language)


class _Group:
    """Generations with the same number of tokens, and their cache. R rows, L tokens, V vocabulary."""

    def __init__(self, members: Sequence[tuple[Generation, _Input]]) -> None:
        self._rows: list[Generation | None] = [generation for generation, _ in members]
        """None marks a row that left but whose cache could not be dropped: it is computed and ignored."""
        self._encoder_ids = [given.encoder_ids for _, given in members]
        self._encoded: Any = None
        """What the encoder made of them."""
        self._next_ids = [list(given.decoder_ids) for _, given in members]
        """What the model (or its decoder) is fed next, per row: the prompt, then the last token."""
        self._cache: Any = None
        self._num_cached = 0

    @property
    def generations(self) -> list[Generation]:
        return [row for row in self._rows if row is not None]

    @property
    def gates(self) -> list[tuple[GateSpec | None, int]]:
        """Whose gate the coming forward's tokens use, and how many they are."""
        rows = zip(self._rows, self._next_ids, strict=True)
        return [(None if row is None else row.request.gate, len(ids)) for row, ids in rows]

    def keep(self, live: set[Generation]) -> None:
        """Forget the rows that are not live, and their cache where that can be done."""
        kept = [index for index, row in enumerate(self._rows) if row in live]
        if len(kept) == len(self._rows):
            return
        # Every layer of the library's cache can select rows; a cache of the model's own may keep more than layers.
        if self._cache is None or type(self._cache) is DynamicCache:
            self._rows = [self._rows[index] for index in kept]
            self._encoder_ids = [self._encoder_ids[index] for index in kept]
            self._next_ids = [self._next_ids[index] for index in kept]
            if self._cache is not None:
                self._cache.reorder_cache(torch.tensor(kept))
        else:
            self._rows = [row if row in live else None for row in self._rows]

    def step(self, model: Any) -> list[tuple[Generation, Choice | None]]:
        next_ids_RL = torch.tensor(self._next_ids, device=model.device)
        logits_RV = (self._decode if any(self._encoder_ids) else self._forward)(model, next_ids_RL)
        live = [index for index, row in enumerate(self._rows) if row is not None]
        generations = self.generations
        choices = choose_tokens(logits_RV[live], [generation.sampling for generation in generations])
        self._next_ids = [[0] for _ in self._rows]
        for index, choice in zip(live, choices, strict=True):
            if choice is not None:
                self._next_ids[index] = [choice.token_id]
        return list(zip(generations, choices, strict=True))

    def _forward(self, model: Any, input_ids_RL: torch.Tensor) -> torch.Tensor:
        """Logits of the last position of each row, as float32."""
        num_rows, num_new = input_ids_RL.shape
        options: dict[str, Any] = {}
        if model._supports_logits_to_keep():
            options["logits_to_keep"] = 1
        if "position_ids" in inspect.signature(model.forward).parameters:
            positions_L = torch.arange(self._num_cached, self._num_cached + num_new, device=input_ids_RL.device)
            options["position_ids"] = positions_L.expand(num_rows, -1)
        output = model(input_ids=input_ids_RL, past_key_values=self._cache, use_cache=True, **options)
        self._cache = output.past_key_values
        self._num_cached += num_new
        logits_RV: torch.Tensor = output.logits[:, -1].float()
        return logits_RV

    def _decode(self, model: Any, input_ids_RL: torch.Tensor) -> torch.Tensor:
        """The same where there is an encoder. One position at a time, as in the first place, since an expert's room
        may depend on how many come together."""
        if self._encoded is None:
            self._encoded = model.get_encoder()(input_ids=torch.tensor(self._encoder_ids, device=model.device))
        for input_ids_R1 in torch.split(input_ids_RL, 1, dim=1):
            output = model(
                encoder_outputs=self._encoded,
                decoder_input_ids=input_ids_R1,
                past_key_values=self._cache,
                use_cache=True,
            )
            self._cache = output.past_key_values
        return output.logits[:, -1].float()  # type: ignore[no-any-return]
