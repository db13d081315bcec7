"""Sampling noise without a state: Gumbel noise as a pure function of (seed, position, token id).

Owns the generator. Does not know logits or requests. Invariant: the same three numbers give the same float64 in every
process, batch and order of calls, and for any subset of the ids, so that a request resumed elsewhere draws the same.

The generator is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014): output
number v of the stream that starts at `key` is mix(key + (v + 1) * GOLDEN), so it needs no stepping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def gumbel(seed: int, position: int, ids_C: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise for each token id. Adding it to scores and taking the arg-max samples from their softmax.

    `position` is the index in the sequence of the token to be chosen.
    """
    key = _mix_int(_mix_int(seed) + (position + 1) * _GOLDEN)
    bits_C = ids_C.astype(np.uint64)
    bits_C += np.uint64(1)
    bits_C *= np.uint64(_GOLDEN)
    bits_C += np.uint64(key)
    _mix_inplace(bits_C)
    # 52 bits and a half: every uniform is exact in float64 and lies strictly between 0 and 1, so no logarithm diverges.
    bits_C >>= np.uint64(12)
    noise_C = bits_C.astype(np.float64)
    noise_C += 0.5
    noise_C *= 2.0**-52
    for _ in range(2):
        np.log(noise_C, out=noise_C)
        np.negative(noise_C, out=noise_C)
    return noise_C


def _mix_int(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _mix_inplace(z: NDArray[np.uint64]) -> None:
    shifted = np.empty_like(z)  # one scratch array: a vocabulary's worth of temporaries costs more than the arithmetic
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        np.right_shift(z, np.uint64(shift), out=shifted)
        z ^= shifted
        z *= np.uint64(factor)
