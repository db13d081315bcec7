"""The cut of pairs into blocks: every pair once, in order, and never two experts in one block."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.kernels.blocks import cut, fill, runs

SORTED_SLOTS = st.lists(st.integers(0, 6), max_size=120).map(sorted)


@given(slots=SORTED_SLOTS, max_pairs=st.integers(1, 40))
def test_blocks_cover_every_pair_once_and_never_mix_slots(slots, max_pairs):
    covered = []
    for slot, first, stop in cut(np.array(slots, dtype=np.int64), max_pairs):
        assert 0 < stop - first <= max_pairs
        assert set(slots[first:stop]) == {slot}
        covered += range(first, stop)
    assert covered == list(range(len(slots)))


def test_an_expert_with_many_pairs_fills_its_blocks():
    assert cut(np.array([3] * 9 + [5]), 4) == [(3, 0, 4), (3, 4, 8), (3, 8, 9), (5, 9, 10)]


@given(slots=SORTED_SLOTS)
def test_runs_are_blocks_that_nothing_cuts(slots):
    assert list(runs(slots)) == cut(np.array(slots, dtype=np.int64), len(slots) + 1)


@given(slots=SORTED_SLOTS, max_pairs=st.integers(1, 40), multiple=st.integers(1, 5))
def test_a_filled_block_begins_with_its_pairs_and_goes_on_with_its_own(slots, max_pairs, multiple):
    blocks = cut(np.array(slots, dtype=np.int64), max_pairs)
    sizes, pairs = fill(blocks, multiple)
    assert len(sizes) == len(blocks)
    assert len(pairs) == sum(sizes)
    for size, (_, first, stop) in zip(sizes, blocks, strict=True):
        assert size % multiple == 0
        assert 0 <= size - (stop - first) < multiple
        mine, pairs = pairs[:size], pairs[size:]
        assert mine[: stop - first] == list(range(first, stop))
        assert all(first <= pair < stop for pair in mine)
