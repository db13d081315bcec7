"""Attention over a paged cache on CPU cores: for each request with its own keys only.

transformers computes plain attention of all requests of a step as one product, under a mask that hides each one's keys
from the others: its work grows with the square of the requests. Only flash attention, which CPUs lack, keeps them
apart. Knows nothing of pages, which the cache resolves. Invariant: a request's attention is computed as if it were
alone. Requests with one new token, as decoding has them, are computed by a kernel in one call; others, and what is
special about a model, by the function that the model would use. Products are float32: for so few rows that is faster
than bfloat16, but where there are units for its matrices.

Shapes: Q new tokens of all requests, S cached and new tokens of all requests, G heads, D of a head.
"""

from __future__ import annotations

import functools
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from expertmesh.kernels.cpu import has_llvm

if TYPE_CHECKING:
    from collections.abc import Callable

_PREFIX = "expertmesh_"


def by_request(attention: str) -> str | None:
    """The name under which transformers knows `attention` computed request by request; None where there is none."""
    name = f"{_PREFIX}{attention}"
    return name if name in _FUNCTIONS else None


def _attend(
    find: Callable[[Any], Callable[..., Any]],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cache: Any = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, G, Q, D] -> [1, Q, G, D].

    Without a paged cache, in a forward that is not the engine's, it is the model's own attention.
    """
    attend = find(module)
    if cache is None:
        output, _ = attend(module, query, key, value, attention_mask, sliding_window=sliding_window, **options)
        return output, None
    # The kernel knows no more than plain attention does.
    is_plain = attend is sdpa_attention_forward and options.get("position_bias") is None
    kernel = _kernel(query.dtype, query.shape[-1]) if is_plain else None
    ends_q = options["cu_seq_lens_q"].tolist()
    allocator = cache.layer_to_allocator[module.layer_idx]
    # Not every model passes its window: some only have it in the mask, which takes no account of the cache.
    window = getattr(allocator, "sliding_window", None)
    in_place = None
    if kernel is not None and window is None and len(ends_q) == query.shape[2] + 1:
        in_place = _in_place(allocator, module.layer_idx, options)
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=options)
    spans = list(zip(pairwise(ends_q), pairwise(options["cu_seq_lens_k"].tolist()), strict=True))
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    if kernel is not None and (rows := _single_tokens(spans, window)):
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        keys, values, seen = in_place or (key[0], value[0], torch.arange(key.shape[2]))
        together = kernel(query[0], keys, values, seen, rows, scale)
        if len(rows) == query.shape[2]:
            return together.unsqueeze(0), None
        output[0, [token for token, *_ in rows]] = together
        spans = [span for span in spans if span[0][1] - span[0][0] > 1]
    dtype = _product_dtype(query.dtype)
    for (from_q, to_q), (from_k, to_k) in spans:
        own_query = query[:, :, from_q:to_q].to(dtype)
        own_key, own_value = (of[:, :, from_k:to_k].to(dtype) for of in (key, value))
        mask = _mask(own_query, own_key, window, is_added=attend is not sdpa_attention_forward)
        part, _ = attend(module, own_query, own_key, own_value, mask, sliding_window=window, **options)
        output[:, from_q:to_q] = part
    return output, None


_Span = tuple[int, int]
"""From the first on, to the end."""


def _single_tokens(spans: list[tuple[_Span, _Span]], window: int | None) -> list[tuple[int, int, int]]:
    """Of requests with one new token: its place, and where the keys that it may see begin and end."""
    return [
        (from_q, from_k if window is None else max(from_k, to_k - window), to_k)
        for (from_q, to_q), (from_k, to_k) in spans
        if to_q - from_q == 1
    ]


def _in_place(
    allocator: Any, layer: int, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The keys and values of a layer as they lie in the cache, [G, tokens, D], and which of the tokens are read.

    The cache is then told to read none, and only writes what is new. None where nothing is read.
    """
    views: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = getattr(allocator, "_kv_token_views", None)
    if views is None or not len(seen := options["read_index"][allocator.index]):
        return None
    options["read_index"] = {allocator.index: seen[:0]}
    keys, values = (of.transpose(0, 1) for of in views[layer])
    return keys, values, seen


@functools.cache
def _kernel(dtype: torch.dtype, width: int) -> Callable[..., torch.Tensor] | None:
    """`cpu_attention.attend`, if it has machine code here for heads of `width` numbers of `dtype`."""
    if not has_llvm():
        return None
    from expertmesh.kernels import cpu_attention

    try:
        cpu_attention.attention_code(dtype, width)
    except RuntimeError:
        return None
    return cpu_attention.attend


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which products of `dtype` are computed fastest here; never a narrower one."""
    has_narrow = torch.cpu._is_amx_tile_supported() if dtype == torch.bfloat16 else dtype.itemsize > 2
    return dtype if has_narrow else torch.float32


def _mask(query: torch.Tensor, key: torch.Tensor, window: int | None, *, is_added: bool) -> torch.Tensor | None:
    """What each new token may see, [1, 1, new, cached and new]; None where it is all that came before it."""
    num_new, num_keys = query.shape[2], key.shape[2]
    if num_new == 1 and (window is None or num_keys <= window):
        return None
    if not is_added and num_new == num_keys and (window is None or num_keys <= window):
        return None  # sdpa's own notion of causal
    at_q = torch.arange(num_keys - num_new, num_keys)[:, None]
    at_k = torch.arange(num_keys)
    seen = at_k <= at_q
    if window is not None:
        seen &= at_k > at_q - window
    seen = seen[None, None]
    if not is_added:
        return seen
    return torch.where(seen, 0.0, torch.finfo(query.dtype).min).to(query.dtype)


def _eager_of(module: Any) -> Callable[..., Any]:
    """The model's own, which knows what is special about it: sinks, caps."""
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return function


_FUNCTIONS = {
    f"{_PREFIX}sdpa": functools.partial(_attend, lambda module: sdpa_attention_forward),
    f"{_PREFIX}eager": functools.partial(_attend, _eager_of),
}
for _name, _function in _FUNCTIONS.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, AttentionMaskInterface()[_name.removeprefix(_PREFIX)])
