"""Continuous batching: requests join and leave at every step. transformers' paged cache and scheduler, our tokens.

Owns the use of transformers' `ContinuousBatchProcessor`, with an attention of ours on CPU cores (attention.py). The
library's loop around it is not used: it brings a thread, and an error in one forward ends it. Does not know when a
request ends. Invariant: the processor's token of a step is the one that our sampler chose for that row, so its cache
and our events cannot disagree, however it splits prompts, shares prefixes or starts a request over for want of memory.
"""

from __future__ import annotations

import sys
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from expertmesh.engine.attention import by_request
from expertmesh.engine.batch import gates_set
from expertmesh.engine.sampling import choose_tokens
from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from expertmesh.engine.batch import Generation, RowGates
    from expertmesh.engine.config import EngineConfig
    from expertmesh.engine.sampling import Choice

_PAGED_LAYERS = {"full_attention", "sliding_attention"}
_PAGED_ATTENTION = {"sdpa", "eager", "paged|eager", "flash_attention_2", "flash_attention_3"}
_FLASH_PAGE = 256
"""Flash attention decodes straight from pages of a multiple of this many tokens."""


class ContinuousBatch:
    """A `Batch` over a paged cache. Raises ConfigError when the cache cannot be built as configured."""

    def __init__(self, model: Any, config: EngineConfig, gates: RowGates | None = None) -> None:
        self._model = model
        self._gates = gates
        self._max_requests = config.max_requests
        self._generations: dict[str, Generation] = {}
        self._chooser = _TokenChooser(self._generations)
        self._attention = model.config._attn_implementation
        try:
            self._processor = self._make_processor(config)
        except (MemoryError, ValueError) as error:
            self._restore_attention()
            raise ConfigError(f"the paged cache cannot be built (kv_tokens={config.kv_tokens}): {error}") from error
        longest = infer_max_single_request_tokens(self._processor.cache)
        if longest < config.max_context:
            self._restore_attention()
            raise ConfigError(
                f"kv_tokens is {config.kv_tokens}, enough for one request of {longest} tokens; raise it so that "
                f"one of max_context ({config.max_context}) fits"
            )
        self._keep_prefixes_apart()

    def _make_processor(self, config: EngineConfig) -> Any:
        decodes_from_pages = self._attention.startswith("flash") and config.page_size % _FLASH_PAGE == 0
        pages_per_request = 2 * ceil(config.max_context / config.page_size / 2) if decodes_from_pages else 0
        manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=config.page_size,
                num_blocks=ceil(config.kv_tokens / config.page_size),
                max_batch_tokens=config.max_batch_tokens,
                max_requests_per_batch=config.max_requests,
                max_blocks_per_request=pages_per_request,
                # A graph would capture the exchange away, and a step in flight while the next is prepared would need
                # its tokens before they are chosen.
                use_cuda_graph=False,
                use_async_batching=False,
                auto_switch_to_flash=False,
                seed=0,  # the library seeds torch's global generator with it; nothing of ours draws from that
            ),
        )
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([self._chooser]))
        processors.tensors_required = 1  # the row of arguments that the list hands to every processor; ours is unused
        manager.logit_processor = processors
        # Only now, because the manager refuses an attention that it does not know; the processor then makes no mask.
        if self._model.device.type == "cpu" and (attention := by_request(self._attention)) is not None:
            self._model.set_attn_implementation(attention)
        return manager._create_batch_processor()

    def _keep_prefixes_apart(self) -> None:
        """Have requests with a gate of their own share no prefix: by another gate the same tokens have other keys."""
        cache = self._processor.cache
        search, count = cache.search_prefix_match, cache.count_new_complete_blocks

        def is_plain(request_id: str) -> bool:
            return self._generations[request_id].request.gate is None

        cache.search_prefix_match = lambda key, ids: search(key, ids) if is_plain(key) else 0
        cache.count_new_complete_blocks = lambda state, n: count(state, n) if is_plain(state.request_id) else {}

    @property
    def num_waiting(self) -> int:
        return 0 if self._processor is None else len(self._processor.scheduler.waiting_requests)

    def has_room(self, generation: Generation) -> bool:
        return len(self._generations) < self._max_requests

    def add(self, generation: Generation) -> None:
        self._generations[generation.key] = generation
        state = RequestState(
            request_id=generation.key, initial_tokens=list(generation.request.prompt_ids), max_new_tokens=None
        )
        self._processor.scheduler.add_waiting_request(state)

    def remove(self, generation: Generation) -> None:
        if self._generations.pop(generation.key, None) is None:
            return
        scheduler = self._processor.scheduler
        scheduler.set_request_cancellation(generation.key)
        scheduler.clear_cancelled_requests()
        # The scheduler refuses new requests after it ran out of memory, until one that it finished itself frees some.
        scheduler.block_new_requests = False

    def schedule(self) -> list[Generation]:
        if not self._processor.prepare_next_batch():
            return []
        return [self._generations[row.state.request_id] for row in self._processor.inputs_and_outputs.requests_in_batch]

    def run(self) -> list[tuple[Generation, Choice | None]]:
        rows = self._processor.inputs_and_outputs.requests_in_batch
        gates = [(self._generations[row.state.request_id].request.gate, row.query_length) for row in rows]
        with gates_set(self._gates, gates):
            self._processor._generation_step(self._model)
        self._processor.update_batch()
        return self._chooser.take()

    def close(self) -> None:
        self._generations.clear()
        self._processor = None
        self._restore_attention()

    def _restore_attention(self) -> None:
        if self._model.config._attn_implementation != self._attention:
            self._model.set_attn_implementation(self._attention)


class _TokenChooser(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Makes the processor's greedy arg-max take the tokens that we choose."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - the base class wants a plain dict
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, generations: dict[str, Generation]) -> None:
        self._generations = generations
        self._rows: list[Generation] = []
        self._choices: list[Choice | None] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Note whose logits the rows of the coming forward are."""
        self._rows = [self._generations[request.state.request_id] for request in requests_with_new_token]
        self._choices = []
        return torch.empty(0, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Raise the chosen token of each row above all others. `scores` is [rows, vocabulary], float32.

        Rows past ours belong to prompts that are not complete; nobody reads their tokens.
        """
        self._choices = choose_tokens(scores[: len(self._rows)], [row.sampling for row in self._rows])
        for row, choice in enumerate(self._choices):
            if choice is not None:
                scores[row, choice.token_id] = torch.inf
        return scores

    def take(self) -> list[tuple[Generation, Choice | None]]:
        return list(zip(self._rows, self._choices, strict=True))


def why_not_continuous(model: Any) -> str | None:
    """Why continuous batching cannot run this model, or None if it can. Looks at the model only; computes nothing."""
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        return "it has an encoder"
    if model._is_stateful:
        return "it carries a recurrent state from token to token"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if foreign := sorted(layer_types - _PAGED_LAYERS):
        return f"it has layers of type {', '.join(foreign)}"
    if model.config._attn_implementation not in _PAGED_ATTENTION:
        return f"its attention runs as {model.config._attn_implementation}"
    return _why_not_paged(model, config)


def _why_not_paged(model: Any, config: Any) -> str | None:
    """The paged cache keeps keys and values of one shape in every layer, which latent attention, for one, does not."""
    attentions = [module for module in model.modules() if hasattr(module, "k_proj") and hasattr(module, "v_proj")]
    if len(attentions) != config.num_hidden_layers:
        return "its attention layers do not all project plain keys and values"
    try:
        width = find_num_key_value_heads(config) * find_head_dim(config)
    except (AttributeError, RuntimeError, ValueError):
        return "its configuration names no single size of head"
    if any(module.k_proj.out_features != width or module.v_proj.out_features != width for module in attentions):
        return "its keys and values are not of one size"
    # Without layer types, the cache takes a configured window for a used one.
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None:
        sources = {sys.modules[type(module).__module__] for module in attentions}
        if not all(hasattr(source, "create_sliding_window_causal_mask") for source in sources):
            return "its configuration names a sliding window that it does not use"
    return None
