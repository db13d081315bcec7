"""The root-mean-square norm of rows: machine code for CPU cores.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, as transformers' models compute it: x over the root of
its mean square, in float32, rounded to the rows' dtype, times the weight, rounded again. Its invariant: a row's bits
depend on the row alone, and are the same on every processor.

Shapes: R rows, H elements of a row.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch
from llvmlite import ir

from expertmesh.kernels.cpu_ir import (
    F32,
    I64,
    LANES,
    POINTER,
    Work,
    at,
    compiled,
    field,
    folded,
    intrinsic,
    loop,
    worker,
)
from expertmesh.kernels.cpu_panels import on_threads, shared_out
from expertmesh.kernels.cpu_row_code import ITEMSIZE, NEEDS, Maths, elements

if TYPE_CHECKING:
    from collections.abc import Sequence

SIDE_BY_SIDE = 4 * LANES
"""Sums of squares: one alone would wait for itself."""
MIN_NUMBERS = 2**17
"""Of rows that are worth waking another thread for."""


class Norm(Work):
    """Rows and what becomes of them, as the code reads it. A turn is a row."""

    _fields_ = (  # type: ignore[assignment]  # after those of `Work`, as ctypes has it
        ("rows", ctypes.c_void_p),  # [R, H]
        ("weight", ctypes.c_void_p),  # [H]
        ("out", ctypes.c_void_p),  # [R, H]
        ("count", ctypes.c_int64),  # H
        ("epsilon", ctypes.c_float),
    )


def rms_norm(x: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x [..., H] -> the same of its rows normed; the weight is contiguous and of x's dtype, one of `spec.DTYPES`.

    Raises RuntimeError as `cpu_ir.compiled`.
    """
    x = x.contiguous()
    y, hidden = torch.empty_like(x), len(weight_H)
    num_rows = x.numel() // hidden
    chunk, num_threads = shared_out(num_rows, x.numel(), MIN_NUMBERS)
    work = Norm(
        next=0,
        end=num_rows,
        chunk=chunk,
        rows=x.data_ptr(),
        weight=weight_H.data_ptr(),
        out=y.data_ptr(),
        count=hidden,
        epsilon=epsilon,
    )
    on_threads(_code(str(x.dtype).removeprefix("torch.")), work, num_threads)
    return y


@functools.cache
def _code(dtype: str) -> int:
    """`void (Norm *)` for rows of `dtype`: the code's address. Compiled once per process."""
    return int(compiled(_module(dtype), NEEDS[dtype]).get_function_address("norm"))


def _module(dtype: str) -> ir.Module:
    module = ir.Module("norm")

    def turn(b: ir.IRBuilder, work: ir.Value, number: ir.Value) -> None:
        count, weight = field(b, work, Norm, "count"), field(b, work, Norm, "weight", POINTER)
        start = b.mul(number, b.mul(count, I64(ITEMSIZE[dtype])))
        row, out = (at(b, field(b, work, Norm, name, POINTER), start) for name in ("rows", "out"))

        def squares(lanes: int, first: ir.Value, times: ir.Value) -> ir.Value:
            maths = Maths(b, lanes)

            def add(k: ir.Value, total: Sequence[ir.Value]) -> list[ir.Value]:
                x = maths.load(dtype, row, b.add(first, b.mul(k, I64(lanes))))
                return [maths.fma(x, x, total[0])]

            (total,) = loop(b, times, [maths.constant(0.0)], add)
            return total

        vectors = b.udiv(count, I64(SIDE_BY_SIDE))
        whole = b.mul(vectors, I64(SIDE_BY_SIDE))
        in_vectors = folded(b, squares(SIDE_BY_SIDE, I64(0), vectors), b.fadd)
        total = b.fadd(in_vectors, squares(1, whole, b.sub(count, whole)))
        mean = b.fadd(b.fdiv(total, b.sitofp(count, F32)), field(b, work, Norm, "epsilon", F32))
        scale = b.fdiv(F32(1.0), b.call(intrinsic(b, "llvm.sqrt.f32", [F32], F32), [mean]))

        def step(maths: Maths, e: ir.Value) -> None:
            x = maths.rounded(dtype, b.fmul(maths.load(dtype, row, e), maths.repeat(scale)))
            maths.store(dtype, b.fmul(x, maths.load(dtype, weight, e)), out, e)

        elements(b, count, step)

    worker(module, "norm", turn)
    return module
