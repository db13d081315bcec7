"""Machine code for what surrounds products: rows gathered and widened to float32, activations, rows rounded at the end.

Owns the code and what it is given (`Rows`). Knows nothing of experts or of torch. Its invariant: an element of a row is
computed by the same IEEE operations wherever it lies, so its bits depend on what it is computed from alone, and are
the same on every processor. Its exponential is within a few units in the last place.

Elements that fill a vector are computed together and the leftover ones one by one, by the same expressions.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llvmlite import ir

from expertmesh.kernels.cpu_ir import (
    F16,
    F32,
    I16,
    I32,
    I64,
    LANES,
    POINTER,
    Work,
    at,
    compiled,
    field,
    fma,
    loop,
    repeated,
    worker,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertmesh.kernels.spec import Activation

NEEDS = {"float32": frozenset({"avx2", "fma"}), "bfloat16": frozenset({"avx2", "fma"})}
NEEDS["float16"] = NEEDS["float32"] | {"f16c"}
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED = {"float32": F32, "bfloat16": I16, "float16": F16}


class Rows(Work):
    """Rows made from rows, as the code reads it. A turn is a row."""

    _fields_ = (  # type: ignore[assignment]  # after those of `Work`, as ctypes has it
        ("source", ctypes.c_void_p),
        ("source_bytes", ctypes.c_int64),  # from a row to the next
        ("target", ctypes.c_void_p),
        ("target_bytes", ctypes.c_int64),
        ("count", ctypes.c_int64),  # elements of a row of the target
        ("index", ctypes.c_void_p),  # int64: of each row of the target, the source's row. Only `gather` reads it
    )


@dataclass(frozen=True, slots=True)
class Maths:
    """Expressions over float32 vectors of `lanes`, or over single numbers where that is 1."""

    b: ir.IRBuilder
    lanes: int

    def of(self, element: ir.Type) -> ir.Type:
        return element if self.lanes == 1 else ir.VectorType(element, self.lanes)

    def constant(self, value: float, element: ir.Type = F32) -> ir.Constant:
        return ir.Constant(self.of(element), value if self.lanes == 1 else [value] * self.lanes)

    def repeat(self, value: ir.Value) -> ir.Value:
        """One float32 number in each lane."""
        return value if self.lanes == 1 else repeated(self.b, value, self.of(F32))

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        return fma(self.b, x, y, z)

    def times(self, x: ir.Value, factor: float) -> ir.Value:
        return self.b.fmul(x, self.constant(factor))

    def plus(self, x: ir.Value, term: float) -> ir.Value:
        return self.b.fadd(x, self.constant(term))

    def at_most(self, x: ir.Value, limit: float) -> ir.Value:
        """What is not a number stays so, here and below."""
        most = self.constant(limit)
        return self.b.select(self.b.fcmp_ordered(">", x, most), most, x)

    def at_least(self, x: ir.Value, limit: float) -> ir.Value:
        least = self.constant(limit)
        return self.b.select(self.b.fcmp_ordered("<", x, least), least, x)

    def exp(self, x: ir.Value) -> ir.Value:
        """e**x for x in [-87, 88], and beyond that its value at the border.

        x is n ln 2 + r with a whole n, and e**r by the polynomial of `expf` in Cephes (Moshier, 1984-1992).
        """
        x = self.at_least(self.at_most(x, 88.0), -87.0)
        shifted = self.fma(x, self.constant(1.44269504088896341), self.constant(_SHIFT))  # n in the lowest bits
        n = self.plus(shifted, -_SHIFT)
        r = self.fma(n, self.constant(-0.693359375), x)
        r = self.fma(n, self.constant(2.12194440e-4), r)
        sum_ = self.constant(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1, 1):
            sum_ = self.fma(sum_, r, self.constant(coefficient))
        whole = self.b.shl(self.b.bitcast(shifted, self.of(I32)), self.constant(23, I32))
        power = self.b.add(whole, self.constant(127 << 23, I32))
        return self.b.fmul(sum_, self.b.bitcast(power, self.of(F32)))

    def over_one_and_exp(self, x: ir.Value, exponent: ir.Value) -> ir.Value:
        """x / (1 + e**exponent)"""
        return self.b.fdiv(x, self.plus(self.exp(exponent), 1.0))

    def sigmoid(self, x: ir.Value) -> ir.Value:
        return self.over_one_and_exp(self.constant(1.0), self.b.fneg(x))

    def silu(self, x: ir.Value) -> ir.Value:
        return self.over_one_and_exp(x, self.b.fneg(x))

    def quick_gelu(self, x: ir.Value) -> ir.Value:
        return self.over_one_and_exp(x, self.times(x, -1.702))

    def gelu_tanh(self, x: ir.Value) -> ir.Value:
        """(1 + tanh z) / 2 is the sigmoid of 2z."""
        cube = self.b.fmul(self.b.fmul(x, x), x)
        return self.over_one_and_exp(x, self.times(self.fma(cube, self.constant(0.044715), x), -1.5957691216057308))

    def relu(self, x: ir.Value) -> ir.Value:
        return self.at_least(x, 0.0)

    def relu2(self, x: ir.Value) -> ir.Value:
        return self.b.fmul(self.relu(x), self.relu(x))

    def clamp(self, x: ir.Value, limit: float) -> ir.Value:
        return self.at_least(self.at_most(x, limit), -limit)

    def load(self, dtype: str, row: ir.Value, e: ir.Value) -> ir.Value:
        """The elements of a row from `e` on, as float32."""
        align = ITEMSIZE[dtype]
        address = at(self.b, row, self.b.mul(e, I64(align)))
        return self._widened(dtype, self.b.load(address, typ=self.of(_STORED[dtype]), align=align))

    def store(self, dtype: str, x: ir.Value, row: ir.Value, e: ir.Value) -> None:
        """Rounded to nearest, and to even between two."""
        align = ITEMSIZE[dtype]
        self.b.store(self._narrowed(dtype, x), at(self.b, row, self.b.mul(e, I64(align))), align=align)

    def rounded(self, dtype: str, x: ir.Value) -> ir.Value:
        """As it would come back if it were stored."""
        return self._widened(dtype, self._narrowed(dtype, x))

    def _widened(self, dtype: str, x: ir.Value) -> ir.Value:
        if dtype == "bfloat16":
            bits = self.b.zext(x, self.of(I32))
            return self.b.bitcast(self.b.shl(bits, self.constant(16, I32)), self.of(F32))
        return self.b.fpext(x, self.of(F32)) if dtype == "float16" else x

    def _narrowed(self, dtype: str, x: ir.Value) -> ir.Value:
        if dtype == "bfloat16":
            return self._rounded_to_bfloat16(x)
        return self.b.fptrunc(x, self.of(F16)) if dtype == "float16" else x

    def _rounded_to_bfloat16(self, x: ir.Value) -> ir.Value:
        b, bits = self.b, self.b.bitcast(x, self.of(I32))
        odd = b.and_(b.lshr(bits, self.constant(16, I32)), self.constant(1, I32))
        rounded = b.lshr(b.add(b.add(bits, self.constant(0x7FFF, I32)), odd), self.constant(16, I32))
        is_nan = b.fcmp_unordered("uno", x, x)
        return b.trunc(b.select(is_nan, self.constant(0x7FC0, I32), rounded), self.of(I16))


def elements(b: ir.IRBuilder, count: ir.Value, step: Callable[[Maths, ir.Value], None]) -> None:
    """`step(maths, e)` for the elements of a row: from each `e` on a vector of them, and the last ones one by one."""

    def run(lanes: int, first: ir.Value, times: ir.Value) -> None:
        def body(k: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
            step(Maths(b, lanes), b.add(first, b.mul(k, I64(lanes))))
            return []

        loop(b, times, [], body)

    vectors = b.udiv(count, I64(LANES))
    run(LANES, I64(0), vectors)
    whole = b.mul(vectors, I64(LANES))
    run(1, whole, b.sub(count, whole))


_SHIFT = 1.5 * 2.0**23
"""Added to a float32 of less than 2**22, it leaves no bits below one."""

_POINTWISE: dict[str, Callable[[Maths, ir.Value], ir.Value]] = {
    "silu": Maths.silu,
    "gelu_pytorch_tanh": Maths.gelu_tanh,
    "quick_gelu": Maths.quick_gelu,
    "relu": Maths.relu,
    "relu2": Maths.relu2,
    "sigmoid": Maths.sigmoid,
    "linear": lambda m, x: x,
}

_GATED: dict[str, Callable[[Maths, ir.Value, ir.Value, Activation], ir.Value]] = {
    "swiglu_clamped": lambda m, gate, up, of: m.b.fmul(m.silu(m.at_most(gate, of.limit)), m.clamp(up, of.limit)),
    "swiglu_bounded": lambda m, gate, up, of: m.b.fmul(m.at_most(m.silu(gate), of.limit), m.clamp(up, of.limit)),
    "swiglu_oai": lambda m, gate, up, of: m.b.fmul(
        m.over_one_and_exp(m.at_most(gate, of.limit), m.times(m.at_most(gate, of.limit), -of.alpha)),
        m.plus(m.clamp(up, of.limit), 1.0),
    ),
}
"""What they compute is said in `activation`."""


@functools.cache
def gather_code(dtype: str, written: str = "float32") -> int:
    """`void (Rows *)`: the rows of `dtype` that `index` names, in `written`. Raises as `cpu_ir.compiled`."""
    return _code(dtype, written, lambda m, row, e, _: m.load(dtype, row, e), indexed=True)


@functools.cache
def round_code(dtype: str) -> int:
    """`void (Rows *)`: rows of float32, in `dtype`."""
    return _code("float32", dtype, lambda m, row, e, _: m.load("float32", row, e))


@functools.cache
def activation_code(activation: Activation, *, gated: bool, written: str = "float32") -> int | None:
    """`void (Rows *)` from float32 rows, gate columns first, then up, to rows of `written`.

    None for an activation that is not here.
    """
    pointwise, both = _POINTWISE.get(activation.name), _GATED.get(activation.name)
    if pointwise is None and (both is None or not gated):
        return None

    def compute(m: Maths, row: ir.Value, e: ir.Value, count: ir.Value) -> ir.Value:
        gate = m.load("float32", row, e)
        if not gated:
            assert pointwise is not None
            return pointwise(m, gate)
        up = m.load("float32", row, m.b.add(e, count))
        if pointwise is not None:
            return m.b.fmul(pointwise(m, gate), up)
        assert both is not None
        return both(m, gate, up, activation)

    return _code("float32", written, compute)


_Compute = Callable[[Maths, ir.Value, ir.Value, ir.Value], ir.Value]
"""The elements from `e` on of a row of the target, out of a row of the source: (maths, row, e, elements of a row)."""


def _code(read: str, written: str, compute: _Compute, *, indexed: bool = False) -> int:
    needs = NEEDS[read] | NEEDS[written]
    return int(compiled(_module(written, compute, indexed=indexed), needs).get_function_address("rows"))


def _module(written: str, compute: _Compute, *, indexed: bool) -> ir.Module:
    module = ir.Module("rows")

    def turn(b: ir.IRBuilder, rows: ir.Value, number: ir.Value) -> None:
        count = field(b, rows, Rows, "count")
        source, target = (field(b, rows, Rows, name, POINTER) for name in ("source", "target"))
        target = at(b, target, b.mul(number, field(b, rows, Rows, "target_bytes")))
        if indexed:
            number = b.load(at(b, field(b, rows, Rows, "index", POINTER), b.mul(number, I64(8))), typ=I64)
        source = at(b, source, b.mul(number, field(b, rows, Rows, "source_bytes")))

        def step(maths: Maths, e: ir.Value) -> None:
            maths.store(written, compute(maths, source, e, count), target, e)

        elements(b, count, step)

    worker(module, "rows", turn)
    return module
