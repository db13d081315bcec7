"""Machine code for the product of rows and panels: each weight is read once, and widened to float32 in registers.

Owns the code and what it is given (`Call`). Knows nothing of experts, of torch, or of who runs it. Its invariant: an
element of y is one chain of fused multiply-adds from its bias along k = 0, 1, ..., K - 1, by IEEE rules; or from 0,
if weights are codes, and then one more with its column's scale and its bias. So its bits
depend on its row and its column alone, and are the same on every processor, whatever the number of rows, of threads and
of registers.

A panel holds `COLUMNS` columns of y: their float32 biases, their scales if weights are codes, then for each k a line of
their weights. The code walks down
the panel with a tile of up to `TILE_ROWS` rows in registers (the outer product of Goto and van de Geijn, "Anatomy of
high-performance matrix multiplication", 2008), and fetches what it will need next while it computes.

Names: x_RK rows, y_RN results, R rows, K depth, N columns; vectors have `LANES` float32.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llvmlite import binding, ir

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COLUMNS = 32
"""Of a panel: a line of 2-byte weights is one cache line."""
LANES = 8
VECTORS = COLUMNS // LANES
TILE_ROWS = 6
"""With half a panel's columns in two vectors: twelve sums, which with what they need fill the sixteen registers."""
WHOLE_PANEL_ROWS = 3
"""Up to this many rows the sums of a whole panel fit: such tiles walk down a panel once, others once for each half."""
NEAR_BYTES = 2048
"""How far ahead of its reads a tile of few rows fetches: it has nothing else to do than to wait for memory."""

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()
_POINTER = ir.PointerType()
_VECTOR = ir.VectorType(_F32, LANES)
_INTS = ir.VectorType(_I32, LANES)
_FMA, _PREFETCH = f"llvm.fma.v{LANES}f32", "llvm.prefetch.p0"
_READ_TO_L2 = (0, 2, 1)
"""What a prefetch is for: to read, from the second level on, data."""


class Call(ctypes.Structure):
    """One product, as the code reads it. Threads that run the code on one call share its work."""

    _fields_ = (
        ("next_panel", ctypes.c_int64),  # the first that no thread has taken; panels are numbered block after block
        ("num_panels", ctypes.c_int64),  # of all blocks together
        ("chunk", ctypes.c_int64),  # panels that a thread takes at a time
        ("panels_per_block", ctypes.c_int64),
        ("depth", ctypes.c_int64),  # K
        ("width", ctypes.c_int64),  # of a row of y, padded to whole panels
        ("x", ctypes.c_void_p),  # float32 [R, K]
        ("y", ctypes.c_void_p),  # float32 [R, width]
        ("blocks", ctypes.c_void_p),  # int64 [blocks, 3]: the address of its first panel, its first row, its end
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How weights lie in a panel, and how `count` vectors of them from one address become float32."""

    itemsize: int
    widen: Callable[[ir.IRBuilder, ir.Value, int], list[ir.Value]]
    needs: frozenset[str]
    """What an x86 processor must have for code that is worth running."""
    scaled: bool = False
    """Whether weights are codes, with a scale for each column."""

    @property
    def head_bytes(self) -> int:
        """Of a panel, before its first line."""
        return 4 * COLUMNS * (2 if self.scaled else 1)


def _widen_float32(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    return [_load(b, address, v * 4 * LANES, _VECTOR) for v in range(count)]


def _widen_float16(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    half = ir.VectorType(_F16, LANES)
    return [b.fpext(_load(b, address, v * 2 * LANES, half), _VECTOR) for v in range(count)]


def _widen_bfloat16(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    """A bfloat16 is the upper half of a float32. Two columns that are `LANES` apart share 32 bits, the first below."""
    vectors = []
    for pair in range(count // 2):
        both = _load(b, address, pair * 4 * LANES, _INTS)
        vectors.append(b.bitcast(b.shl(both, ir.Constant(_INTS, [16] * LANES)), _VECTOR))
        vectors.append(b.bitcast(b.and_(both, ir.Constant(_INTS, [0xFFFF0000] * LANES)), _VECTOR))
    return vectors


def _widen_int8(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    return [b.sitofp(code, _VECTOR) for code in _bytes(b, address, count)]


def _widen_fp8(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    """The bits of a float8 e4m3, in place, are those of a float32 whose exponent is biased by 120 more."""
    vectors = []
    for code in _bytes(b, address, count):
        moved = b.shl(code, ir.Constant(_INTS, [20] * LANES))
        bits = b.and_(moved, ir.Constant(_INTS, [0x87F00000] * LANES))
        vectors.append(b.fmul(b.bitcast(bits, _VECTOR), ir.Constant(_VECTOR, [2.0**120] * LANES)))
    return vectors


def _bytes(b: ir.IRBuilder, address: ir.Value, count: int) -> list[ir.Value]:
    """Vectors of bytes as signed numbers of 32 bits."""
    kind = ir.VectorType(_I8, LANES)
    return [b.sext(b.load(_at(b, address, v * LANES), typ=kind, align=LANES), _INTS) for v in range(count)]


FORMATS = {
    "float32": Format(itemsize=4, widen=_widen_float32, needs=frozenset({"avx2", "fma"})),
    "bfloat16": Format(itemsize=2, widen=_widen_bfloat16, needs=frozenset({"avx2", "fma"})),
    "float16": Format(itemsize=2, widen=_widen_float16, needs=frozenset({"avx2", "fma", "f16c"})),
    "int8": Format(itemsize=1, widen=_widen_int8, needs=frozenset({"avx2", "fma"}), scaled=True),
    "fp8": Format(itemsize=1, widen=_widen_fp8, needs=frozenset({"avx2", "fma"}), scaled=True),
}
"""By the dtype of the weights, or the name of their codes."""


@functools.cache
def product_code(dtype: str) -> int:
    """The address of a C function `void (Call *)` for weights of `dtype`. Compiled once per process, in about 0.15 s.

    Raises RuntimeError on a processor that has no vector instructions for it.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    target = binding.Target.from_default_triple()
    if target.name.startswith("x86") and (
        missing := FORMATS[dtype].needs - {name for name in features if features[name]}
    ):
        raise RuntimeError(f"this processor lacks {', '.join(sorted(missing))}")
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=2)
    # What is built below needs no optimisation but the selection of instructions.
    module = binding.parse_assembly(str(_module(FORMATS[dtype])))
    module.verify()
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address("product"))


_engines: list[binding.ExecutionEngine] = []
"""The code lives as long as its engine."""


def _module(form: Format) -> ir.Module:
    module = ir.Module("product")
    ir.Function(module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), _FMA)
    ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER, _I32, _I32, _I32]), _PREFETCH)
    tiles = [_tile(module, form, num_rows) for num_rows in range(1, TILE_ROWS + 1)]
    _product(module, form, tiles)
    return module


def _product(module: ir.Module, form: Format, tiles: list[ir.Function]) -> None:
    """`void product(Call *)`: takes chunks of panels until there are none, and computes each for its block's rows.

    A block's rows are cut into tiles of nearly equal height, as few as can be: 8 are 4 and 4, not 6 and 2.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), "product")
    entry, take, panel, rows, switched, panel_end, done = (
        function.append_basic_block(name)
        for name in ("entry", "take", "panel", "rows", "switched", "panel_end", "done")
    )
    (call,) = function.args
    b = ir.IRBuilder(entry)
    names = [name for name, _ in Call._fields_]

    def field(name: str, kind: ir.Type = _I64) -> ir.Value:
        return b.load(_at(b, call, 8 * names.index(name)), typ=kind)

    num_panels, chunk, per_block = field("num_panels"), field("chunk"), field("panels_per_block")
    depth, width = field("depth"), field("width")
    x, y, blocks = field("x", _POINTER), field("y", _POINTER), field("blocks", _POINTER)
    panel_bytes = b.add(b.mul(depth, _I64(form.itemsize * COLUMNS)), _I64(form.head_bytes))
    b.branch(take)

    b.position_at_end(take)
    first_panel = b.atomic_rmw("add", _at(b, call, 8 * names.index("next_panel")), chunk, "monotonic")
    last_panel = _min(b, b.add(first_panel, chunk), num_panels)
    b.cbranch(b.icmp_signed("<", first_panel, num_panels), panel, done)

    b.position_at_end(panel)
    number = b.phi(_I64)
    number.add_incoming(first_panel, take)
    block = _at(b, blocks, b.mul(b.udiv(number, per_block), _I64(3 * 8)))
    column = b.urem(number, per_block)
    address = _at(b, b.load(block, typ=_POINTER), b.mul(column, panel_bytes))
    first_row, end_row = (b.load(_at(b, block, offset), typ=_I64) for offset in (8, 16))
    y_panel = _at(b, y, b.mul(column, _I64(4 * COLUMNS)))
    b.branch(rows)

    b.position_at_end(rows)
    row = b.phi(_I64)
    row.add_incoming(first_row, panel)
    left = b.sub(end_row, row)
    height = _divide_up(b, left, _divide_up(b, left, _I64(TILE_ROWS)))
    cases = b.switch(height, switched)
    for num_rows, tile in enumerate(tiles, start=1):
        case = function.append_basic_block(f"rows_{num_rows}")
        cases.add_case(_I64(num_rows), case)
        b.position_at_end(case)
        x_row, y_row = (_at(b, base, b.mul(b.mul(row, size), _I64(4))) for base, size in ((x, depth), (y_panel, width)))
        b.call(tile, [x_row, address, _at(b, address, panel_bytes), depth, y_row, width])
        b.branch(switched)

    b.position_at_end(switched)
    next_row = b.add(row, height)
    row.add_incoming(next_row, switched)
    b.cbranch(b.icmp_signed("<", next_row, end_row), rows, panel_end)

    b.position_at_end(panel_end)
    next_number = b.add(number, _I64(1))
    number.add_incoming(next_number, panel_end)
    b.cbranch(b.icmp_signed("<", next_number, last_panel), panel, take)

    b.position_at_end(done)
    b.ret_void()


def _tile(module: ir.Module, form: Format, num_rows: int) -> ir.Function:
    """`void (x, panel, next_panel, depth, y, width)` for `num_rows` rows of x and y from the given addresses."""
    kinds = [_POINTER, _POINTER, _POINTER, _I64, _POINTER, _I64]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), f"tile_{num_rows}")
    function.linkage = "internal"
    x, panel, next_panel, depth, y, width = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    x_rows, y_rows = (
        [_at(b, base, b.mul(size, _I64(4 * r))) for r in range(num_rows)] for base, size in ((x, depth), (y, width))
    )
    count = VECTORS if num_rows <= WHOLE_PANEL_ROWS else VECTORS // 2
    vector_bytes = LANES * form.itemsize
    for start in range(0, VECTORS, count):
        lines = _at(b, panel, form.head_bytes + start * vector_bytes)
        if count == VECTORS:
            ahead = _at(b, lines, NEAR_BYTES)
        else:  # each walk is bound by arithmetic, and fetches its share of the whole next panel meanwhile
            ahead = _at(b, next_panel, b.mul(depth, _I64(start * vector_bytes)))

        def step(
            k: ir.Value, sums: Sequence[ir.Value], lines: ir.Value = lines, ahead: ir.Value = ahead
        ) -> list[ir.Value]:
            fetched = _at(b, ahead, b.mul(k, _I64(count * vector_bytes)))
            b.call(module.globals[_PREFETCH], [fetched, *map(_I32, _READ_TO_L2)])
            weights = form.widen(b, _at(b, lines, b.mul(k, _I64(VECTORS * vector_bytes))), count)
            x_ks = [_repeat(b, b.load(_at(b, x_row, b.mul(k, _I64(4))), typ=_F32)) for x_row in x_rows]
            factors = [(weight, x_k) for x_k in x_ks for weight in weights]
            return [b.call(module.globals[_FMA], [*pair, one]) for pair, one in zip(factors, sums, strict=True)]

        biases = [_load(b, panel, 4 * LANES * v, _VECTOR) for v in range(start, start + count)]
        zeros = [ir.Constant(_VECTOR, [0.0] * LANES)] * count
        sums = _loop(b, depth, (zeros if form.scaled else biases) * num_rows, step)
        if form.scaled:
            scales = [_load(b, panel, 4 * (COLUMNS + LANES * v), _VECTOR) for v in range(start, start + count)]
            terms = zip(sums, scales * num_rows, biases * num_rows, strict=True)
            sums = [b.call(module.globals[_FMA], [*term]) for term in terms]
        for r, y_row in enumerate(y_rows):
            for v in range(count):
                b.store(sums[r * count + v], _at(b, y_row, 4 * LANES * (start + v)), align=4)
    b.ret_void()
    return function


def _loop(
    b: ir.IRBuilder,
    times: ir.Value,
    values: Sequence[ir.Value],
    step: Callable[[ir.Value, Sequence[ir.Value]], Sequence[ir.Value]],
) -> Sequence[ir.Value]:
    """`for k in range(times): values = step(k, values)`, at least once: the last values."""
    before, body, after = b.block, b.append_basic_block("body"), b.append_basic_block("after")
    b.branch(body)
    b.position_at_end(body)
    k, *carried = [b.phi(value.type) for value in (times, *values)]
    stepped = step(k, carried)
    next_k = b.add(k, _I64(1))
    for phi, first, later in zip((k, *carried), (_I64(0), *values), (next_k, *stepped), strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, body)
    b.cbranch(b.icmp_signed("<", next_k, times), body, after)
    b.position_at_end(after)
    return stepped


def _at(b: ir.IRBuilder, base: ir.Value, offset: ir.Value | int) -> ir.Value:
    """The address that many bytes on."""
    return b.gep(base, [_I64(offset) if isinstance(offset, int) else offset], source_etype=_I8)


def _load(b: ir.IRBuilder, base: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    """A vector from within a panel, where all begin at multiples of 16 bytes."""
    return b.load(_at(b, base, offset), typ=kind, align=16)


def _repeat(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A vector of one number."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, value, _I32(0)), undefined, ir.Constant(_INTS, [0] * LANES))


def _min(b: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", left, right), left, right)


def _divide_up(b: ir.IRBuilder, value: ir.Value, by: ir.Value) -> ir.Value:
    return b.udiv(b.add(value, b.sub(by, _I64(1))), by)
