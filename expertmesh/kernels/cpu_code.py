"""Machine code for the product of rows and panels: each weight is read once, and widened to float32 in registers.

Owns the code and what it is given (`Call`). Knows nothing of experts, of torch, or of who runs it. Its invariant: an
element of y is one chain of fused multiply-adds from its bias along k = 0, 1, ..., K - 1, by IEEE rules; or from 0,
if weights are codes, and then one more with its column's scale and its bias. So its bits depend on its row and its
column alone, and are the same on every processor, whatever the number of rows, of threads and of registers. Where rows
and weights are multiplied in pairs, as bfloat16, a link of the chain is the processor's own dot product of two: its
bits depend on row and column alone too, but it may round otherwise than another maker's.

A panel holds `COLUMNS` columns of y: their float32 biases, their scales if weights are codes, then for each k, or pair
of k, a line of their weights. The code walks down the panel with a tile of rows in registers (the outer product of
Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008), and fetches what it will need next
while it computes.

Names: x_RK rows, y_RN results, R rows, K depth, N columns.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llvmlite import ir

from expertmesh.kernels.cpu_ir import (
    F16,
    F32,
    I8,
    I32,
    I64,
    LANES,
    POINTER,
    Work,
    at,
    compiled,
    divide_up,
    field,
    fma,
    intrinsic,
    loop,
    prefetch,
    repeated,
    worker,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COLUMNS = 32
"""Of a panel: a line of 2-byte weights is one cache line."""
PAIRS = "bfloat16 pairs"
"""The format of bfloat16 weights that are multiplied two by two, with rows of bfloat16."""
NEAR_BYTES = 4096
"""How far ahead of its reads."""

_VECTOR = ir.VectorType(F32, LANES)
_INTS = ir.VectorType(I32, LANES)


class Call(Work):
    """One product, as the code reads it. A turn is a panel; they are numbered block after block."""

    _fields_ = (  # type: ignore[assignment]  # after those of `Work`, as ctypes has it
        ("panels_per_block", ctypes.c_int64),
        ("depth", ctypes.c_int64),  # lines of a panel, each of which takes 4 bytes of a row of x: K, or pairs of K
        ("width", ctypes.c_int64),  # of a row of y, padded to whole panels
        ("x", ctypes.c_void_p),  # [R, K] float32, or bfloat16 where they are multiplied in pairs
        ("y", ctypes.c_void_p),  # float32 [R, width]
        ("blocks", ctypes.c_void_p),  # int64 [blocks, 3]: the address of its first panel, its first row, its end
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How weights lie in a panel, how they are read and multiplied, and how many rows of sums the registers hold."""

    itemsize: int
    """Bytes of a column in a line."""
    read: Callable[[ir.IRBuilder, ir.Value, int], list[ir.Value]]
    """As many vectors of weights from an address, as they are multiplied."""
    needs: frozenset[str]
    """What an x86 processor must have for code that is worth running."""
    scaled: bool = False
    """Whether weights are codes, with a scale for each column."""
    lanes: int = LANES
    multiply_add: Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]
    """Of a vector of weights, 4 bytes of a row in each lane, and what their products are added to."""
    tile_rows: int = 6
    """With half a panel's columns in two vectors: twelve sums, which with what they need fill sixteen registers."""
    whole_panel_rows: int = 3
    """Tiles of up to so many rows walk down a panel once, as all their sums fit; others once for each half."""
    near_rows: int = 3
    """Tiles of up to so many mostly wait for memory, and fetch what they will read next themselves."""

    @property
    def head_bytes(self) -> int:
        """Of a panel, before its first line."""
        return 4 * COLUMNS * (2 if self.scaled else 1)


def _read_float32(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    return [_load(b, address, v * 4 * LANES, _VECTOR) for v in range(count)]


def _read_float16(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    half = ir.VectorType(F16, LANES)
    return [b.fpext(_load(b, address, v * 2 * LANES, half), _VECTOR) for v in range(count)]


def _read_bfloat16(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    """A bfloat16 is the upper half of a float32. Two columns that are `LANES` apart share 32 bits, the first below."""
    vectors = []
    for pair in range(count // 2):
        both = _load(b, address, pair * 4 * LANES, _INTS)
        vectors.append(b.bitcast(b.shl(both, ir.Constant(_INTS, [16] * LANES)), _VECTOR))
        vectors.append(b.bitcast(b.and_(both, ir.Constant(_INTS, [0xFFFF0000] * LANES)), _VECTOR))
    return vectors


def _read_int8(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    return [b.sitofp(code, _VECTOR) for code in _bytes(b, address, count)]


def _read_fp8(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    """The bits of a float8 e4m3, in place, are those of a float32 whose exponent is biased by 120 more."""
    vectors = []
    for code in _bytes(b, address, count):
        moved = b.shl(code, ir.Constant(_INTS, [20] * LANES))
        bits = b.and_(moved, ir.Constant(_INTS, [0x87F00000] * LANES))
        vectors.append(b.fmul(b.bitcast(bits, _VECTOR), ir.Constant(_VECTOR, [2.0**120] * LANES)))
    return vectors


def _bytes(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    """Vectors of bytes as signed numbers of 32 bits."""
    kind = ir.VectorType(I8, LANES)
    return [b.sext(b.load(at(b, address, v * LANES), typ=kind, align=LANES), _INTS) for v in range(count)]


class _BFloat16(ir.HalfType):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's, which llvmlite lacks."""

    def __str__(self) -> str:
        return "bfloat"


_BFloat16._create_instance()
_WIDE = ir.VectorType(F32, 16)
_WIDE_PAIRS = ir.VectorType(_BFloat16(), 32)


def _read_pairs(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    return [_load(b, address, v * 64, _WIDE_PAIRS) for v in range(count)]


def _dot_of_pairs(b: ir.IRBuilder, weights: ir.Value, x: ir.Value, sums: ir.Value) -> ir.Value:
    dot = intrinsic(b, "llvm.x86.avx512bf16.dpbf16ps.512", [_WIDE, _WIDE_PAIRS, _WIDE_PAIRS], _WIDE)
    return b.call(dot, [sums, b.bitcast(x, _WIDE_PAIRS), weights])


_FMA = frozenset({"avx2", "fma"})
FORMATS = {
    "float32": Format(itemsize=4, read=_read_float32, multiply_add=fma, needs=_FMA),
    "bfloat16": Format(itemsize=2, read=_read_bfloat16, multiply_add=fma, needs=_FMA),
    "float16": Format(itemsize=2, read=_read_float16, multiply_add=fma, needs=_FMA | {"f16c"}),
    "int8": Format(itemsize=1, read=_read_int8, multiply_add=fma, needs=_FMA, scaled=True),
    "fp8": Format(itemsize=1, read=_read_fp8, multiply_add=fma, needs=_FMA, scaled=True),
    PAIRS: Format(
        itemsize=4,
        read=_read_pairs,
        multiply_add=_dot_of_pairs,
        needs=frozenset({"avx512bf16"}),
        lanes=16,
        tile_rows=12,  # 24 sums of 32 registers
        whole_panel_rows=12,
        near_rows=6,
    ),
}
"""By the dtype of the weights, or the name of their codes."""


@functools.cache
def product_code(dtype: str) -> int:
    """The address of a C function `void (Call *)` for weights of `dtype`. Compiled once per process, in about 0.15 s.

    Raises RuntimeError on a processor that has no vector instructions for it.
    """
    form = FORMATS[dtype]
    return int(compiled(_module(form), form.needs).get_function_address("product"))


def _module(form: Format) -> ir.Module:
    module = ir.Module("product")
    tiles = [_tile(module, form, num_rows) for num_rows in range(1, form.tile_rows + 1)]
    _product(module, form, tiles)
    return module


def _product(module: ir.Module, form: Format, tiles: list[ir.Function]) -> None:
    """`void product(Call *)`: each turn computes a panel for its block's rows.

    A block's rows are cut into tiles of nearly equal height, as few as can be: 8 are 4 and 4, not 6 and 2.
    """

    def turn(b: ir.IRBuilder, call: ir.Value, number: ir.Value) -> None:
        per_block, depth, width = (field(b, call, Call, name) for name in ("panels_per_block", "depth", "width"))
        x, y, blocks = (field(b, call, Call, name, POINTER) for name in ("x", "y", "blocks"))
        panel_bytes = b.add(b.mul(depth, I64(form.itemsize * COLUMNS)), I64(form.head_bytes))
        block = at(b, blocks, b.mul(b.udiv(number, per_block), I64(3 * 8)))
        column = b.urem(number, per_block)
        panel = at(b, b.load(block, typ=POINTER), b.mul(column, panel_bytes))
        first_row, end_row = (b.load(at(b, block, offset), typ=I64) for offset in (8, 16))
        y_panel = at(b, y, b.mul(column, I64(4 * COLUMNS)))
        before, rows, switched, after = b.block, *(b.append_basic_block(name) for name in ("rows", "switched", "after"))
        b.branch(rows)

        b.position_at_end(rows)
        row = b.phi(I64)
        row.add_incoming(first_row, before)
        left = b.sub(end_row, row)
        height = divide_up(b, left, divide_up(b, left, I64(form.tile_rows)))
        cases = b.switch(height, switched)
        for num_rows, tile in enumerate(tiles, start=1):
            case = b.append_basic_block(f"rows_{num_rows}")
            cases.add_case(I64(num_rows), case)
            b.position_at_end(case)
            x_row, y_row = (
                at(b, base, b.mul(b.mul(row, size), I64(4))) for base, size in ((x, depth), (y_panel, width))
            )
            b.call(tile, [x_row, panel, at(b, panel, panel_bytes), depth, y_row, width])
            b.branch(switched)

        b.position_at_end(switched)
        next_row = b.add(row, height)
        row.add_incoming(next_row, switched)
        b.cbranch(b.icmp_signed("<", next_row, end_row), rows, after)
        b.position_at_end(after)

    worker(module, "product", turn)


def _tile(module: ir.Module, form: Format, num_rows: int) -> ir.Function:
    """`void (x, panel, next_panel, depth, y, width)` for `num_rows` rows of x and y from the given addresses."""
    kinds = [POINTER, POINTER, POINTER, I64, POINTER, I64]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), f"tile_{num_rows}")
    function.linkage = "internal"
    x, panel, next_panel, depth, y, width = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    x_rows, y_rows = (
        [at(b, base, b.mul(size, I64(4 * r))) for r in range(num_rows)] for base, size in ((x, depth), (y, width))
    )
    vectors = COLUMNS // form.lanes
    count = vectors if num_rows <= form.whole_panel_rows else vectors // 2
    vector_bytes = form.lanes * form.itemsize
    sums_type = ir.VectorType(F32, form.lanes)
    near = num_rows <= form.near_rows
    for start in range(0, vectors, count):
        lines = at(b, panel, form.head_bytes + start * vector_bytes)
        # Each walk of many rows is bound by arithmetic, and fetches its share of the whole next panel meanwhile.
        ahead = at(b, lines, NEAR_BYTES) if near else at(b, next_panel, b.mul(depth, I64(start * vector_bytes)))

        def step(
            k: ir.Value, sums: Sequence[ir.Value], lines: ir.Value = lines, ahead: ir.Value = ahead
        ) -> list[ir.Value]:
            prefetch(b, at(b, ahead, b.mul(k, I64(count * vector_bytes))), count * vector_bytes, near=near)
            weights = form.read(b, at(b, lines, b.mul(k, I64(vectors * vector_bytes))), count)
            x_ks = [repeated(b, b.load(at(b, x_row, b.mul(k, I64(4))), typ=F32), sums_type) for x_row in x_rows]
            factors = [(weight, x_k) for x_k in x_ks for weight in weights]
            return [form.multiply_add(b, *pair, one) for pair, one in zip(factors, sums, strict=True)]

        columns = range(start * form.lanes, (start + count) * form.lanes, form.lanes)
        biases = [_load(b, panel, 4 * column, sums_type) for column in columns]
        zeros = [ir.Constant(sums_type, [0.0] * form.lanes)] * count
        sums = loop(b, depth, (zeros if form.scaled else biases) * num_rows, step)
        if form.scaled:
            scales = [_load(b, panel, 4 * (COLUMNS + column), sums_type) for column in columns]
            terms = zip(sums, scales * num_rows, biases * num_rows, strict=True)
            sums = [fma(b, one, scale, bias) for one, scale, bias in terms]
        targets = [at(b, y_row, 4 * column) for y_row in y_rows for column in columns]
        for one, target in zip(sums, targets, strict=True):
            b.store(one, target, align=4)
    b.ret_void()
    return function


def _load(b: ir.IRBuilder, base: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    """A vector from within a panel, where all begin at multiples of 16 bytes."""
    return b.load(at(b, base, offset), typ=kind, align=16)
