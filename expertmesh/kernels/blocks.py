"""How the pairs of a call are cut into blocks, each of one expert. Knows nothing of tensors."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

MAX_PAIRS = 1024
"""Computed together on CPU cores, which bounds the memory that they are computed in."""


class Block(NamedTuple):
    """The pairs from `first` up to and without `stop`, all of one slot."""

    slot: int
    first: int
    stop: int


def cut(slot_P: NDArray[np.int64], max_pairs: int) -> list[Block]:
    """Cut pairs grouped by slot into blocks of at most `max_pairs`, in order."""
    if len(slot_P) == 0:
        return []
    starts = [0, *(np.flatnonzero(slot_P[1:] != slot_P[:-1]) + 1).tolist()]
    stops = [*starts[1:], len(slot_P)]
    return [
        Block(slot, first, min(first + max_pairs, stop))
        for slot, start, stop in zip(slot_P[starts].tolist(), starts, stops, strict=True)
        for first in range(start, stop, max_pairs)
    ]


def runs(slot_P: Sequence[int]) -> Iterator[Block]:
    """A block for each run of one slot, however long: for calls so small that they do not pay for numpy."""
    first = 0
    for slot, pairs in itertools.groupby(slot_P):
        stop = first + len(list(pairs))
        yield Block(slot, first, stop)
        first = stop


def fill(blocks: Iterable[Block], multiple: int) -> tuple[list[int], list[int]]:
    """Lay the blocks out one after another, each filled up to a multiple of rows by repeating its last pair.

    Returns each block's size so filled, and each row's pair.
    """
    sizes: list[int] = []
    pairs: list[int] = []
    for _, first, stop in blocks:
        missing = (first - stop) % multiple
        sizes.append(stop - first + missing)
        pairs += range(first, stop)
        pairs += [stop - 1] * missing
    return sizes, pairs
