"""The weighted sum of each token's expert rows: machine code for CPU cores.

The arithmetic is that of `moe.layer.combine`, step for step: products and sums in float32, one expert after the other,
rounded once. In one pass over the rows instead of four per expert.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

from llvmlite import ir

from expertmesh.kernels.cpu_ir import F32, I64, POINTER, Work, at, compiled, field, loop, worker
from expertmesh.kernels.cpu_panels import on_threads, shared_out
from expertmesh.kernels.cpu_row_code import ITEMSIZE, NEEDS, Maths, elements

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

MIN_NUMBERS = 2**17
"""Of rows that are worth waking another thread for."""


class Combine(Work):
    """What is summed, as the code reads it. A turn is a token."""

    _fields_ = (  # type: ignore[assignment]  # after those of `Work`, as ctypes has it
        ("rows", ctypes.c_void_p),  # [T, K, H]
        ("weights", ctypes.c_void_p),  # float32 [T, K]
        ("out", ctypes.c_void_p),  # [T, H]
        ("choices", ctypes.c_int64),  # K
        ("count", ctypes.c_int64),  # H
    )


def combine(rows_TKH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """y_TH in the rows' dtype; both are contiguous, the weights float32. Raises RuntimeError as `cpu_ir.compiled`."""
    num_tokens, num_choices, hidden = rows_TKH.shape
    y_TH = rows_TKH.new_empty(num_tokens, hidden)
    chunk, num_threads = shared_out(num_tokens, rows_TKH.numel(), MIN_NUMBERS)
    work = Combine(
        next=0,
        end=num_tokens,
        chunk=chunk,
        rows=rows_TKH.data_ptr(),
        weights=weights_TK.data_ptr(),
        out=y_TH.data_ptr(),
        choices=num_choices,
        count=hidden,
    )
    on_threads(_code(str(rows_TKH.dtype).removeprefix("torch.")), work, num_threads)
    return y_TH


@functools.cache
def _code(dtype: str) -> int:
    """`void (Combine *)` for rows of `dtype`: the code's address. Compiled once per process."""
    return int(compiled(_module(dtype), NEEDS[dtype]).get_function_address("combine"))


def _module(dtype: str) -> ir.Module:
    module = ir.Module("combine")

    def turn(b: ir.IRBuilder, work: ir.Value, token: ir.Value) -> None:
        choices, count = field(b, work, Combine, "choices"), field(b, work, Combine, "count")
        row_bytes = b.mul(count, I64(ITEMSIZE[dtype]))
        rows = at(b, field(b, work, Combine, "rows", POINTER), b.mul(b.mul(token, choices), row_bytes))
        weights = at(b, field(b, work, Combine, "weights", POINTER), b.mul(b.mul(token, choices), I64(4)))
        out = at(b, field(b, work, Combine, "out", POINTER), b.mul(token, row_bytes))

        def step(maths: Maths, e: ir.Value) -> None:
            def weighted(k: ir.Value) -> ir.Value:
                weight = b.load(at(b, weights, b.mul(k, I64(4))), typ=F32)
                return b.fmul(maths.load(dtype, at(b, rows, b.mul(k, row_bytes)), e), maths.repeat(weight))

            def add(k: ir.Value, total: Sequence[ir.Value]) -> list[ir.Value]:
                return [b.fadd(total[0], weighted(b.add(k, I64(1))))]

            (total,) = loop(b, b.sub(choices, I64(1)), [weighted(I64(0))], add)
            maths.store(dtype, total, out, e)

        elements(b, count, step)

    worker(module, "combine", turn)
    return module
