"""A trace's records summed over windows of equal length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from expertmesh.trace.format import Record


@dataclass(frozen=True, slots=True)
class Window:
    """The rows that every layer's experts got from `start_s` on."""

    start_s: float
    rows: list[NDArray[np.int64]]
    """Per layer, [E]."""


def windows(records: Iterable[Record], num_experts: Sequence[int], window_s: float) -> Iterator[Window]:
    """All windows up to the last record's, those without load included.

    A record that comes late, as with several routers it may, counts in the window that is open when it comes.
    """
    number = 0
    rows = [np.zeros(count, dtype=np.int64) for count in num_experts]
    empty = True
    for record in records:
        while record.time_s >= (number + 1) * window_s:
            yield Window(number * window_s, rows)
            rows = [np.zeros(count, dtype=np.int64) for count in num_experts]
            number += 1
        rows[record.layer] += record.rows_E
        empty = False
    if not empty:
        yield Window(number * window_s, rows)
