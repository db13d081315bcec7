"""Sampling noise without a state: Gumbel noise as a pure function of (seed, position, token id).

Owns the generator. Does not know logits or requests. Invariant: the same three numbers give the same noise in every
process and batch and under every release of numpy, so that a request resumed elsewhere draws what it would have drawn.

The generator is Philox4x64-10 (Salmon et al.: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011), whose stream numpy
guarantees. The seed is its key; the position is the second word of its 256-bit counter, so no two streams overlap.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEEDS = 1 << 64
"""Those that differ by a multiple of this are one."""
_UNIFORM_BITS = 52


def noise_bits(seed: int, position: int, num_ids: int) -> NDArray[np.uint64]:
    """The random word of each token id from 0. `position` is the index in the sequence of the token to be chosen."""
    counter = np.array([0, position, 0, 0], np.uint64)
    return np.random.Philox(key=seed % SEEDS, counter=counter).random_raw(num_ids)


def gumbel(bits_C: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard Gumbel noise. Adding it to scores and taking the arg-max samples from the scores' softmax.

    Grows with the bits, and is finite: a uniform is 52 bits and a half, exact in float64 and strictly between 0 and 1.
    """
    noise_C = (bits_C >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float64)
    noise_C += 0.5
    noise_C *= 2.0**-_UNIFORM_BITS
    return -np.log(-np.log(noise_C))


def least_bits_above(bound: float) -> np.uint64:
    """Bits below which no noise exceeds `bound`. Comparing bits costs a small part of computing the noise."""
    uniform = math.exp(-math.exp(min(-bound, 700.0)))
    # One step less than exact, for what the logarithms round.
    return np.uint64(max(0, math.floor(uniform * (1 - 2.0**-40) * 2**_UNIFORM_BITS) - 1) << (64 - _UNIFORM_BITS))
