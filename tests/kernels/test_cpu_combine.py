"""The weighted sum in machine code, against the same sum written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.kernels.spec import DTYPES
from expertmesh.moe.layer import combine

pytest.importorskip("llvmlite")


def written_out(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(len(rows), rows.shape[2])
    for k in range(rows.shape[1]):
        total = rows[:, k].float() * weights[:, k, None].float() + (total if k else 0)
    return total.to(rows.dtype)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 9), num_choices=st.integers(1, 8), hidden=st.integers(1, 70), seed=st.integers(0, 2**20)
)
def test_it_is_the_sum_in_the_gates_order_rounded_once(dtype, weights_dtype, num_tokens, num_choices, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tokens, num_choices, hidden, generator=generator).to(getattr(torch, dtype))
    weights = torch.rand(num_tokens, num_choices, generator=generator).to(weights_dtype)
    found = combine(rows, weights)
    assert found.dtype == rows.dtype
    assert torch.equal(found, written_out(rows, weights))


def test_many_rows_are_divided_among_threads_to_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(300, 4, 512, generator=generator).bfloat16(), torch.rand(300, 4, generator=generator)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(combine(rows, weights), written_out(rows, weights))
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_so():
    rows = torch.tensor([[[1.0, torch.inf, torch.nan, -torch.inf]]]).bfloat16()
    found = combine(rows, torch.ones(1, 1))
    assert torch.equal(found.isnan(), torch.tensor([[False, False, True, False]]))
    assert found[0, 1] == torch.inf
    assert found[0, 3] == -torch.inf


def test_a_gradient_is_not_lost():
    rows = torch.randn(3, 2, 8, requires_grad=True)
    combine(rows, torch.ones(3, 2)).sum().backward()
    assert torch.equal(rows.grad, torch.ones(3, 2, 8))
