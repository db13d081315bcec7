"""Weights in panels, held in the spec's dtype or in its codes, and the product with them on torch's threads.

Owns the packing and the division of a product among threads; the machine code is `cpu_code`'s, and so is the invariant:
an element of a product is one chain of float32 sums along its row, whoever computes it and beside whatever else.

Shapes: R rows, K columns, N results of a row; a weight is [panels, bytes of a panel], in `cpu_code`'s layout.
"""

from __future__ import annotations

import ctypes
import functools
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from expertmesh.kernels.cpu_code import COLUMNS, LANES, Call, product_code

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

MAX_CHUNK = 8
"""Panels that a thread takes at a time, at most. A thread that goes on to the next panel has fetched it already."""
CHUNKS_PER_THREAD = 4
"""At least, where there are panels enough: so that a thread that was held up leaves its work to the others."""

HEAD_BYTES = 4 * COLUMNS


def pack(dtype: torch.dtype, w_NK: Tensor, b_N: Tensor | None) -> Tensor:
    """Panels of weights in `dtype`, which must hold them exactly; the last one is filled with zeros."""
    num_results, depth = w_NK.shape
    num_panels = -(-num_results // COLUMNS)
    missing = num_panels * COLUMNS - num_results
    w = F.pad(w_NK.to(dtype), (0, 0, 0, missing)).view(num_panels, COLUMNS, depth).transpose(1, 2)
    if dtype == torch.bfloat16:
        w = w.reshape(num_panels, depth, -1, 2, LANES).transpose(-1, -2)
    return torch.cat([_head(b_N, num_results), w.contiguous().view(torch.uint8).view(num_panels, -1)], dim=1)


def pack_codes(codes_NK: Tensor, s_N: Tensor, b_N: Tensor | None) -> Tensor:
    """Panels of codes of one byte, which each row's scale turns into its weights."""
    num_results, depth = codes_NK.shape
    num_panels = -(-num_results // COLUMNS)
    codes = F.pad(codes_NK.view(torch.uint8), (0, 0, 0, num_panels * COLUMNS - num_results))
    lines = codes.view(num_panels, COLUMNS, depth).transpose(1, 2).reshape(num_panels, -1)
    return torch.cat([_head(b_N, num_results), _head(s_N, num_results), lines], dim=1)


def _head(values_N: Tensor | None, num_results: int) -> Tensor:
    """Biases or scales as each panel begins with them; zeros where there are none."""
    num_panels = -(-num_results // COLUMNS)
    filled = torch.zeros(num_panels * COLUMNS)
    if values_N is not None:
        filled[:num_results] = values_N
    return filled.view(torch.uint8).view(num_panels, HEAD_BYTES)


def multiply(dtype: str, x_RK: Tensor, sizes: list[int], weights: Sequence[Tensor]) -> Tensor:
    """y_RN, where N is filled up to whole panels: `sizes` rows of float32 x_RK by each of `weights`, in order."""
    x_RK = x_RK.contiguous()
    num_rows, depth = x_RK.shape
    per_block = len(weights[0])
    num_panels = per_block * len(weights)
    num_threads = torch.get_num_threads()
    blocks = np.array(
        [(w.data_ptr(), *rows) for w, rows in zip(weights, pairwise(accumulate(sizes, initial=0)), strict=True)],
        np.int64,
    )
    y_RN = torch.empty(num_rows, per_block * COLUMNS)
    call = Call(
        next_panel=0,
        num_panels=num_panels,
        chunk=min(MAX_CHUNK, -(-num_panels // (CHUNKS_PER_THREAD * num_threads))),
        panels_per_block=per_block,
        depth=depth,
        width=y_RN.shape[1],
        x=x_RK.data_ptr(),
        y=y_RN.data_ptr(),
        blocks=blocks.ctypes.data,
    )
    _on_threads(_code(dtype), call, num_threads)
    return y_RN


_Code = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _code(dtype: str) -> Callable[..., None]:
    return _Code(product_code(dtype))


@functools.cache
def _parallel() -> Callable[..., None] | None:
    """OpenMP's entry for compiled parallel regions, of the runtime whose threads torch uses; None where it has none."""
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if entry is not None:
        entry.argtypes, entry.restype = [_Code, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return entry


def _on_threads(code: Callable[..., None], call: Call, num_threads: int) -> None:
    """Run the code on `call` to its end, on torch's own threads: others would contend with them for the cores."""
    address, parallel = ctypes.addressof(call), _parallel()
    if num_threads == 1 or parallel is None:
        code(address)
    else:
        parallel(code, address, num_threads, 0)
