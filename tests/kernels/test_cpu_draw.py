"""Which tokens may win a draw, against the noise of every token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.engine.noise import SEEDS, gumbel, noise_bits

cpu_draw = pytest.importorskip("expertmesh.kernels.cpu_draw")

seeds = st.integers(0, SEEDS - 1)
finite = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False)


def winner(logits: np.ndarray, temperature: float, seed: int, position: int) -> int:
    with np.errstate(over="ignore"):
        scores = logits.astype(np.float64) / temperature
    return int((scores + gumbel(noise_bits(seed, position, len(logits)))).argmax())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    logits=st.lists(
        st.one_of(finite, st.just(-np.inf), st.floats(-5, 5, width=32, allow_subnormal=False)), min_size=1, max_size=40
    ),
    temperature=st.sampled_from([1e-5, 0.3, 1.0, 2.0, 100.0]),
    seed=seeds,
    position=st.integers(0, 2**40),
)
def test_the_winner_is_always_among_them(logits, temperature, seed, position) -> None:
    row = np.array(logits, np.float32)
    row[seed % len(row)] = 1.0  # one is finite
    ids, bits = cpu_draw.contenders(row, temperature, seed, position)
    assert (np.diff(ids) > 0).all()
    assert (bits == noise_bits(seed, position, len(row))[ids]).all()
    assert winner(row, temperature, seed, position) in ids.tolist()


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 255, 5003])
def test_they_are_few_and_the_winner_is_among_them_in_vocabularies_of_any_size(size: int, spread: float) -> None:
    logits = (np.random.default_rng(size).normal(size=size) * spread).astype(np.float32)
    counts = []
    for seed in range(100):
        ids, _ = cpu_draw.contenders(logits, 1.0, seed, 7)
        counts.append(len(ids))
        assert winner(logits, 1.0, seed, 7) in ids.tolist()
    assert np.mean(counts) < 10 * np.log2(size + 1)


def test_a_row_that_is_not_contiguous_is_read_as_it_is() -> None:
    logits = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    ids, _ = cpu_draw.contenders(logits[:, 1], 1.0, 3, 4)
    assert ids.tolist() == cpu_draw.contenders(logits[:, 1].copy(), 1.0, 3, 4)[0].tolist()
