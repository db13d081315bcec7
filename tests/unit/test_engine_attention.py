"""Attention request by request, against softmax written out in double precision."""

from __future__ import annotations

from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.gpt_oss import modeling_gpt_oss

from expertmesh.engine.attention import by_request

HEADS, KV_HEADS, SIZE = 4, 2, 8
LENGTHS = [(1, 9), (1, 30), (6, 6), (3, 11), (1, 1), (12, 12)]
"""Of each request: new tokens, and those with the cached."""


class Gathered:
    """A paged cache that has gathered its keys and values already."""

    def __init__(self, lengths: list[tuple[int, int]], window: int | None) -> None:
        self._num_keys = [num_keys for _, num_keys in lengths]
        self.layer_to_allocator = {0: SimpleNamespace(sliding_window=window) if window else SimpleNamespace()}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        kwargs["cu_seq_lens_k"] = torch.tensor([0, *accumulate(self._num_keys)])
        return key_states, value_states


def attend(kind: str, own: Any, lengths: list[tuple[int, int]], window: int | None = None) -> torch.Tensor:
    ends = torch.tensor([0, *accumulate(num_new for num_new, _ in lengths)])
    cache = Gathered(lengths, window)
    function = AttentionInterface()[by_request(kind)]
    output, _ = function(module(kind), *own, None, scaling=SIZE**-0.5, cache=cache, cu_seq_lens_q=ends, is_causal=True)
    return output


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    num_new, num_keys = (sum(column) for column in zip(*LENGTHS, strict=True))
    shapes = (HEADS, num_new), (KV_HEADS, num_keys), (KV_HEADS, num_keys)
    return tuple(torch.randn(1, heads, length, SIZE, generator=generator) for heads, length in shapes)  # type: ignore[return-value]


def module(kind: str) -> Any:
    # The function is looked up beside the class, as transformers' own files have it.
    of = torch.nn.Module if kind == "sdpa" else modeling_gpt_oss.GptOssAttention
    found = of.__new__(of)
    torch.nn.Module.__init__(found)
    found.num_key_value_groups, found.layer_idx, found.is_causal = HEADS // KV_HEADS, 0, True
    found.sinks = torch.full((HEADS,), -1e4)
    return found


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """[1, new, heads, size], from one request's query [1, heads, new, size] and keys."""
    num_new, num_keys = query.shape[2], key.shape[2]
    output = torch.empty(1, num_new, HEADS, SIZE, dtype=torch.float64)
    for head in range(HEADS):
        of = head // (HEADS // KV_HEADS)
        for new in range(num_new):
            last = num_keys - num_new + new
            first = 0 if window is None else max(0, last - window + 1)
            scores = key[0, of, first : last + 1].double() @ query[0, head, new].double() / SIZE**0.5
            output[0, new, head] = scores.softmax(0) @ value[0, of, first : last + 1].double()
    return output


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_each_request_sees_its_own_keys_up_to_each_token_and_no_others(kind, window):
    query, key, value = tensors()
    found = attend(kind, (query, key, value), LENGTHS, window)
    ends_q, ends_k = ([0, *accumulate(column)] for column in zip(*LENGTHS, strict=True))
    for (from_q, to_q), (from_k, to_k), lengths in zip(pairwise(ends_q), pairwise(ends_k), LENGTHS, strict=True):
        own = query[:, :, from_q:to_q], key[:, :, from_k:to_k], value[:, :, from_k:to_k]
        torch.testing.assert_close(found[:, from_q:to_q].double(), written_out(*own, window), rtol=1e-5, atol=1e-6)
        alone = attend(kind, own, [lengths], window)
        assert torch.equal(found[:, from_q:to_q], alone), "the same bits as without company"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_narrow_numbers_are_rounded_no_more_than_the_library_rounds_them(kind, dtype):
    query, key, value = (tensor[:, :, :12].to(dtype) for tensor in tensors())
    found = attend(kind, (query, key, value), [(12, 12)])
    assert found.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), written_out(query, key, value, None), rtol=tolerance, atol=tolerance)


def test_an_attention_that_is_not_plain_is_left_to_the_library():
    assert by_request("flash_attention_2") is None
    assert by_request("paged|eager") is None
