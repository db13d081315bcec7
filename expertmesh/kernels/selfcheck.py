"""What a machine must prove before it may compute experts: that a pair's result stands alone, and which bits it gives.

The libraries beneath us promise neither. So a kernel is tried on a probe expert of the real shape: `is_row_invariant`
compares rows computed among many with the same rows computed among few, and `fingerprint` condenses the bits.
Two hosts whose kernels have one fingerprint give one answer; hosts that differ still agree to rounding.

Probes are the same bits on every machine: integers from torch's generator, scaled by powers of two.
Shapes: R rows, H hidden.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch

from expertmesh.kernels.quantization import quantize
from expertmesh.kernels.spec import ExpertWeights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from expertmesh.kernels import ExpertKernel
    from expertmesh.kernels.spec import ExpertSpec

ROW_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31, 32, 33, 64, 127)
"""Row counts on both sides of where libraries change their tiling."""


def probe_rows(spec: ExpertSpec, count: int) -> Tensor:
    """Rows to try an expert on: [count, H] in the spec's dtype, on CPU, of magnitude about one."""
    return _noise((count, spec.hidden), scale=2.0, seed=1).to(getattr(torch, spec.dtype))


def probe_weights(spec: ExpertSpec) -> ExpertWeights:
    """An expert to try a kernel on, scaled so that activations are of magnitude about one."""
    dtype = getattr(torch, spec.dtype)
    fan_in = {"w_in": spec.hidden, "w_out": spec.intermediate, "b_in": 1, "b_out": 1}
    tensors = {
        name: _noise(shape, scale=2.0 ** -round(math.log2(fan_in[name]) / 2), seed=seed).to(dtype)
        for seed, (name, shape) in enumerate(spec.shapes.items(), start=2)
    }
    return quantize(ExpertWeights(**tensors), spec)


def is_row_invariant(ffn: Callable[[Tensor], Tensor], x_RH: Tensor) -> bool:
    """Whether `ffn` gives each row the same bits alone, in a few others' company and in all of x_RH."""
    whole_RH = ffn(x_RH)
    num_rows = len(x_RH)
    for count in (count for count in ROW_COUNTS if count < num_rows):
        # The last rows, so that a row that was among the last is now the first, at another alignment.
        if not torch.equal(ffn(x_RH[num_rows - count :]), whole_RH[num_rows - count :]):
            return False
    return True


def fingerprint(kernel: ExpertKernel) -> str:
    """Names the bits that `kernel` gives: equal on two hosts, their replicas are interchangeable to the last bit.

    Call it before any expert is loaded: it writes the probe expert into slot 0 and clears it. On a GPU it also
    compiles the kernels, so that the first request does not wait for that.
    """
    kernel.write(0, probe_weights(kernel.spec))
    rows = torch.arange(8)
    y_RH = kernel.run(probe_rows(kernel.spec, len(rows)), rows, torch.zeros_like(rows))
    kernel.clear(0)
    return hashlib.sha256(y_RH.float().numpy().tobytes()).hexdigest()[:16]


def _noise(shape: tuple[int, ...], *, scale: float, seed: int) -> Tensor:
    """Uniform in [-scale, scale); a short random stretch repeated, as a real expert has hundreds of millions."""
    size = math.prod(shape)
    # A prime length, so that no row of a matrix begins where another does.
    stretch = torch.randint(-(2**23), 2**23, (min(size, 65537),), generator=torch.Generator().manual_seed(seed))
    values = stretch.to(torch.float32) * (scale * 2.0**-23)
    return values.repeat(-(-size // len(values)))[:size].reshape(shape)
