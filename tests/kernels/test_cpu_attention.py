"""Attention of single tokens in machine code, against softmax in float64, and against itself in other company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.kernels.spec import DTYPES

cpu_attention = pytest.importorskip("expertmesh.kernels.cpu_attention")

TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}


@pytest.fixture(autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int, dtype: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


def softmax_of(query, key, value, seen, rows, scale):
    """[R, G, D] in float64."""
    sharing = len(query) // len(key)
    key, value = (tensor[:, seen].double().repeat_interleave(sharing, 0) for tensor in (key, value))
    parts = []
    for token, first, end in rows:
        weights = (torch.einsum("gd,gsd->gs", query[:, token].double(), key[:, first:end]) * scale).softmax(-1)
        parts.append(torch.einsum("gs,gsd->gd", weights, value[:, first:end]))
    return torch.stack(parts)


def case(num_keys: list[int], *, heads: int = 4, sharing: int = 2, width: int = 16, dtype: str = "float32"):
    """As an engine lays it out: tokens before heads, seen the other way round; and in the cache tokens of all rows, in
    any order, among others."""
    query = normal(len(num_keys), heads, width, seed=0, dtype=dtype).transpose(0, 1)
    cached = sum(num_keys) + 5
    key, value = (normal(cached, heads // sharing, width, seed=seed, dtype=dtype).transpose(0, 1) for seed in (1, 2))
    seen = torch.randperm(cached, generator=torch.Generator().manual_seed(3))[: sum(num_keys)]
    ends = torch.tensor(num_keys).cumsum(0).tolist()
    rows = [(token, end - count, end) for token, (count, end) in enumerate(zip(num_keys, ends, strict=True))]
    return query, key, value, seen, rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 24, 64, 128, 200])
def test_it_is_the_softmax_over_a_rows_own_keys(dtype: str, width: int) -> None:
    query, key, value, seen, rows = case([1, 2, 15, 16, 17, 33, 100], width=width, dtype=dtype)
    out = cpu_attention.attend(query, key, value, seen, rows, width**-0.5)
    expected = softmax_of(query, key, value, seen, rows, width**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_scores_of_any_size_do_not_overflow() -> None:
    query, key, value, seen, rows = case([40])
    out = cpu_attention.attend(200 * query, 200 * key, value, seen, rows, 1.0)
    torch.testing.assert_close(
        out.double(), softmax_of(200 * query, 200 * key, value, seen, rows, 1.0), rtol=1e-4, atol=1e-4
    )


def test_what_is_not_a_number_does_not_become_one() -> None:
    query, key, value, seen, rows = case([20, 20])
    key[:, seen[5]] = torch.nan
    out = cpu_attention.attend(query, key, value, seen, rows, 1.0)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    num_keys=st.lists(st.integers(1, 70), min_size=1, max_size=12),
    sharing=st.sampled_from([1, 2, 4]),
    num_threads=st.integers(1, 3),
    chosen=st.randoms(use_true_random=False),
)
def test_a_row_has_the_same_bits_in_any_company(dtype, num_keys, sharing, num_threads, chosen) -> None:
    query, key, value, seen, rows = case(num_keys, sharing=sharing, dtype=dtype)
    torch.set_num_threads(num_threads)
    whole = cpu_attention.attend(query, key, value, seen, rows, 0.25)
    some = chosen.sample(range(len(rows)), chosen.randint(1, len(rows)))
    torch.set_num_threads(1)
    assert torch.equal(cpu_attention.attend(query, key, value, seen, [rows[row] for row in some], 0.25), whole[some])


def test_many_rows_are_divided_among_threads() -> None:
    torch.set_num_threads(3)
    query, key, value, seen, rows = case([300] * 24, heads=8, width=64)
    assert cpu_attention.MIN_NUMBERS <= 24 * 300 * 8 * 64
    out = cpu_attention.attend(query, key, value, seen, rows, 0.125)
    torch.testing.assert_close(out.double(), softmax_of(query, key, value, seen, rows, 0.125), rtol=2e-6, atol=2e-6)


def test_a_width_that_vectors_do_not_divide_is_refused() -> None:
    with pytest.raises(RuntimeError, match="a head of 12"):
        cpu_attention.attention_code(torch.float32, 12)
