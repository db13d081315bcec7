"""Attention of one new token of each request over its own keys and values: machine code for CPU cores.

What decoding needs at every layer, for all requests in one call; torch computes it request by request, in bfloat16
several times slower than in float32. Owns the code, what it is given (`Attend`), and the call. Knows nothing of pages
or of models. Its invariant: a head's result is computed by the same IEEE operations in the same order, block of keys
after block, so its bits depend on its query, keys and values alone, and are the same on every processor.

The softmax is taken block by block, as sums are corrected when a greater score comes (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018). All is float32; the result is rounded once.

Shapes: Q new tokens, C tokens in the cache, S those of them that are seen, R rows (requests), G heads, D of a head.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
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
    divide_up,
    field,
    folded,
    loop,
    minimum,
    prefetch,
    repeated,
    scratch,
    worker,
)
from expertmesh.kernels.cpu_panels import on_threads, shared_out
from expertmesh.kernels.cpu_row_code import ITEMSIZE, NEEDS, Maths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

BLOCK = 2 * LANES
"""Keys whose scores are turned into weights together."""
TOGETHER = 4
"""Keys whose products with the query, and vectors of a result, are summed side by side."""
MIN_NUMBERS = 2**18
"""Of keys, all heads together, that are worth waking another thread for."""


class Attend(Work):
    """The heads of all rows, as the code reads them. A turn is a head of a row."""

    _fields_ = (  # type: ignore[assignment]  # after those of `Work`, as ctypes has it
        ("query", ctypes.c_void_p),
        ("query_head", ctypes.c_int64),  # bytes from a head to the next, here and below
        ("query_token", ctypes.c_int64),  # bytes from a token to the next
        ("key", ctypes.c_void_p),
        ("key_head", ctypes.c_int64),
        ("key_token", ctypes.c_int64),
        ("value", ctypes.c_void_p),
        ("value_head", ctypes.c_int64),
        ("value_token", ctypes.c_int64),
        ("out", ctypes.c_void_p),  # [R, G, D]
        ("num_heads", ctypes.c_int64),
        ("sharing", ctypes.c_int64),  # heads that have their keys and values in common
        ("rows", ctypes.c_void_p),  # int64 [R, 3]: its token, and where in `seen` its keys begin and end
        ("seen", ctypes.c_void_p),  # int64 [S]: the token of each key
        ("scale", ctypes.c_float),
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen_S: Tensor, rows: Sequence[tuple[int, int, int]], scale: float
) -> Tensor:
    """query [G, Q, D], key and value [at most G, C, D] -> [R, G, D], all of one dtype.

    Keys and values are read where they lie: int64 `seen_S` names their tokens, request after request. `rows` has, of
    each row, its token's place in `query`, and where its keys begin and end in `seen_S`. Raises RuntimeError as
    `attention_code` does.
    """
    num_heads, _, width = query.shape
    assert all(tensor.stride(2) == 1 for tensor in (query, key, value)), "the numbers of a head must lie side by side"
    assert seen_S.dtype == torch.int64
    assert seen_S.is_contiguous()
    code = attention_code(query.dtype, width)
    out = query.new_empty(len(rows), num_heads, width)
    table = array("q", [number for row in rows for number in row])
    num_turns = len(rows) * num_heads
    num_numbers = sum(end - first for _, first, end in rows) * num_heads * width
    chunk, num_threads = shared_out(num_turns, num_numbers, MIN_NUMBERS)
    places = {
        f"{name}_{step}": tensor.stride(dim) * tensor.itemsize
        for name, tensor in (("query", query), ("key", key), ("value", value))
        for step, dim in (("head", 0), ("token", 1))
    }
    work = Attend(
        next=0,
        end=num_turns,
        chunk=chunk,
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        out=out.data_ptr(),
        num_heads=num_heads,
        sharing=num_heads // key.shape[0],
        rows=table.buffer_info()[0],
        seen=seen_S.data_ptr(),
        scale=scale,
        **places,
    )
    on_threads(code, work, num_threads)
    return out


@functools.cache
def attention_code(dtype: torch.dtype, width: int) -> int:
    """`void (Attend *)` for heads of `width` numbers of `dtype`: the code's address. Compiled once per process.

    Raises RuntimeError for a width that vectors do not divide, and as `cpu_ir.compiled`.
    """
    if width % LANES:
        raise RuntimeError(f"a head of {width} is not made of vectors of {LANES}")
    name = str(dtype).removeprefix("torch.")
    return int(compiled(_module(name, width), NEEDS[name]).get_function_address("attend"))


def _module(dtype: str, width: int) -> ir.Module:
    module = ir.Module("attend")
    worker(module, "attend", lambda b, work, number: _Head(b, work, number, dtype, width).write())
    return module


class _Head:
    """The code of one head of one row."""

    def __init__(self, b: ir.IRBuilder, work: ir.Value, number: ir.Value, dtype: str, width: int) -> None:
        self._b, self._dtype, self._width = b, dtype, width
        self._maths = Maths(b, LANES)
        self._query, self._sums, self._scores = (scratch(b, size) for size in (width, width, BLOCK))
        num_heads, sharing = field(b, work, Attend, "num_heads"), field(b, work, Attend, "sharing")
        head, row = b.urem(number, num_heads), b.udiv(number, num_heads)
        token, self._first, self._end = (
            b.load(at(b, field(b, work, Attend, "rows", POINTER), b.add(b.mul(row, I64(24)), I64(offset))), typ=I64)
            for offset in (0, 8, 16)
        )
        self._query_row = self._place(work, "query", head, token)
        self._seen = field(b, work, Attend, "seen", POINTER)
        self._keys, self._values = (self._place(work, name, b.udiv(head, sharing), I64(0)) for name in ("key", "value"))
        next_head = minimum(b, b.add(head, I64(1)), b.sub(num_heads, I64(1)))
        steps = b.sub(b.udiv(next_head, sharing), b.udiv(head, sharing))
        self._next_keys, self._next_values = (
            b.mul(steps, field(b, work, Attend, f"{name}_head")) for name in ("key", "value")
        )
        self._key_step, self._value_step = (field(b, work, Attend, f"{name}_token") for name in ("key", "value"))
        self._out = at(b, field(b, work, Attend, "out", POINTER), b.mul(number, I64(width * ITEMSIZE[dtype])))
        self._scale = self._maths.repeat(field(b, work, Attend, "scale", F32))

    def _place(self, work: ir.Value, name: str, head: ir.Value, token: ir.Value) -> ir.Value:
        b = self._b
        steps = (
            b.mul(number, field(b, work, Attend, f"{name}_{step}"))
            for number, step in ((head, "head"), (token, "token"))
        )
        return at(b, field(b, work, Attend, name, POINTER), b.add(*steps))

    def write(self) -> None:
        b, m = self._b, self._maths
        for e in range(0, self._width, LANES):
            m.store("float32", b.fmul(m.load(self._dtype, self._query_row, I64(e)), self._scale), self._query, I64(e))
            m.store("float32", m.constant(0.0), self._sums, I64(e))
        blocks = divide_up(b, b.sub(self._end, self._first), I64(BLOCK))
        _, total = loop(b, blocks, [F32(float("-inf")), F32(0.0)], self._block)
        total = self._maths.repeat(total)
        for e in range(0, self._width, LANES):
            m.store(self._dtype, b.fdiv(m.load("float32", self._sums, I64(e)), total), self._out, I64(e))

    def _block(self, k: ir.Value, before: Sequence[ir.Value]) -> list[ir.Value]:
        """Take BLOCK keys more: the greatest score so far, and the sum of all weights relative to it."""
        b, m = self._b, self._maths
        start = b.add(self._first, b.mul(k, I64(BLOCK)))
        for group in range(0, BLOCK, TOGETHER):
            self._score(start, group)
        lane = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
        halves, seen = [], []
        for half in (0, LANES):
            left = repeated(b, b.sub(self._end, b.add(start, I64(half))), ir.VectorType(I64, LANES))
            seen.append(b.icmp_signed("<", lane, left))
            scores = m.load("float32", self._scores, I64(half))
            halves.append(b.select(seen[-1], scores, m.constant(float("-inf"))))
        greatest, total = before
        peak = folded(b, self._greater(*halves), self._greater)
        new_greatest = self._greater(greatest, peak)
        kept = Maths(b, 1).exp(b.fsub(greatest, new_greatest))
        weights = []
        for half, scores, are_seen in zip((0, LANES), halves, seen, strict=True):
            weight = m.exp(b.fsub(scores, self._maths.repeat(new_greatest)))
            weights.append(b.select(are_seen, weight, m.constant(0.0)))
            m.store("float32", weights[-1], self._scores, I64(half))
        self._add_values(start, self._maths.repeat(kept))
        return [new_greatest, Maths(b, 1).fma(total, kept, folded(b, b.fadd(*weights), b.fadd))]

    def _score(self, start: ir.Value, group: int) -> None:
        """Write the scores of TOGETHER keys. Past the end the last key stands in; its scores are not used."""
        b, m = self._b, self._maths
        last = b.sub(self._end, I64(1))
        places = [minimum(b, b.add(start, I64(group + i)), last) for i in range(TOGETHER)]
        rows = [at(b, self._keys, b.mul(self._token(place), self._key_step)) for place in places]
        for row in rows:
            self._prefetch(row, self._next_keys)
        sums = [m.constant(0.0)] * TOGETHER
        for e in range(0, self._width, LANES):
            query = m.load("float32", self._query, I64(e))
            sums = [m.fma(query, m.load(self._dtype, row, I64(e)), one) for row, one in zip(rows, sums, strict=True)]
        for i, one in enumerate(sums):
            b.store(folded(b, one, b.fadd), at(b, self._scores, 4 * (group + i)), align=4)

    def _add_values(self, start: ir.Value, kept: ir.Value) -> None:
        """Add BLOCK values by their weights to the sums, of which `kept` remains."""
        b, m = self._b, self._maths
        last = b.sub(self._end, I64(1))
        for first in range(0, self._width, LANES * TOGETHER):
            places = [I64(e) for e in range(first, min(first + LANES * TOGETHER, self._width), LANES)]
            sums = [b.fmul(m.load("float32", self._sums, e), kept) for e in places]

            def step(
                i: ir.Value, sums: Sequence[ir.Value], places: Sequence[ir.Value] = places, first: int = first
            ) -> list[ir.Value]:
                row = at(b, self._values, b.mul(self._token(minimum(b, b.add(start, i), last)), self._value_step))
                if first == 0:
                    self._prefetch(row, self._next_values)
                weight = self._maths.repeat(b.load(at(b, self._scores, b.mul(i, I64(4))), typ=F32, align=4))
                values = [m.load(self._dtype, row, e) for e in places]
                return [m.fma(weight, value, one) for value, one in zip(values, sums, strict=True)]

            for e, one in zip(places, loop(b, I64(BLOCK), sums, step), strict=True):
                m.store("float32", one, self._sums, e)

    def _prefetch(self, row: ir.Value, step: ir.Value) -> None:
        """Of the next head, what this one reads here: it lies beside it, but far from what either reads next."""
        prefetch(self._b, at(self._b, row, step), self._width * ITEMSIZE[self._dtype], near=False)

    def _token(self, place: ir.Value) -> ir.Value:
        return self._b.load(at(self._b, self._seen, self._b.mul(place, I64(8))), typ=I64)

    def _greater(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self._b.select(self._b.fcmp_ordered(">", x, y), x, y)
