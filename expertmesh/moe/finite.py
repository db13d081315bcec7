"""Whether rows are finite, found fast: every row of every layer is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SPECIAL: dict[str, tuple[type[np.signedinteger], type[np.unsignedinteger], int, int]] = {
    "float32": (np.int32, np.uint32, 0x7F800000, 0xFF800000),
    "bfloat16": (np.int16, np.uint16, 0x7F80, 0xFF80),
    "float16": (np.int16, np.uint16, 0x7C00, 0xFC00),
}
"""Read as integers, infinity and above it NaNs are the greatest: the positive ones of signed integers, the negative of
unsigned ones. So two maxima find them, and nothing has to be written."""


def not_finite(rows_PB: NDArray[np.uint8], dtype: str) -> NDArray[np.bool_] | None:
    """For each row, whether NaN or an infinity is in it; None when there is none in any. `rows_PB` are raw bytes."""
    signed, unsigned, positive, negative = _SPECIAL[dtype]
    signed_PH, unsigned_PH = rows_PB.view(signed), rows_PB.view(unsigned)
    if signed_PH.max(initial=0) < positive and unsigned_PH.max(initial=0) < negative:
        return None
    is_special_PH: NDArray[np.bool_] = (signed_PH >= positive) | (unsigned_PH >= negative)
    return np.asarray(is_special_PH.any(axis=1))
