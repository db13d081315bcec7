"""Which tokens can win a draw, in one pass over a row of logits: machine code for CPU cores.

To draw from a softmax is to take the arg-max of scores with Gumbel noise (engine/noise.py), whose two logarithms per
token are what a draw costs. But how many leading ones the token's random bits have says within 1.1 what the noise is.
So the pass makes the bits, compares what a token has at most with what the best before it has at least, and leaves a
few dozen tokens of a vocabulary to be looked at in earnest. Owns the code and its bounds; the noise is the caller's.

The generator is Philox4x64-10 as numpy seeds it (see engine/noise.py).
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import TYPE_CHECKING

import numpy as np
from llvmlite import ir

from expertmesh.kernels.cpu_ir import F32, I64, POINTER, at, compiled, intrinsic, loop, scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

_FLOATS = ir.VectorType(F32, 4)
_F64, _I1, _I128 = ir.DoubleType(), ir.IntType(1), ir.IntType(128)
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_ROUNDS = 10
_WORDS = 4
"""Tokens whose bits are made together."""
_BITS = 52
"""Of a uniform u, as noise.py has it; and so its leading ones, at most."""
_LN2 = math.log(2.0)
_AT_MOST = _LN2 + 0.01
"""With k leading ones 1 - u is above 2**-(k+1), and the noise -ln(-ln u) below -ln(1 - u). A hundredth is for rounding,
of scores up to 10**13."""
_AT_LEAST = -0.33
"""With k >= 1, 1 - u is at most 2**-k and -ln u at most 2 ln 2 times that. ln(2 ln 2) is 0.327."""
_LEAST = -4.0
"""With k = 0: u is at least 2**-53."""


def contenders(
    logits_V: NDArray[np.float32], temperature: float, seed: int, position: int
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The tokens that may have the highest sum of logit / temperature and noise, ascending, and their random bits.

    Those that do have it are among them, if any logit is finite and none is NaN. `seed` is below 2**64.
    """
    logits_V = np.ascontiguousarray(logits_V)
    # One more than there can be, as one that is no contender is written too. Nearly all of it is never touched.
    ids_N, bits_N = np.empty(len(logits_V) + 1, np.int64), np.empty(len(logits_V) + 1, np.uint64)
    count = _code()(
        len(logits_V), logits_V.ctypes.data, temperature, seed, position, ids_N.ctypes.data, bits_N.ctypes.data
    )
    return ids_N[:count], bits_N[:count]


@functools.cache
def _code() -> Callable[..., int]:
    """`int64 contenders(n, logits, temperature, seed, position, ids, bits)`. Compiled once per process."""
    numbers = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_double, ctypes.c_uint64, ctypes.c_uint64]
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *numbers, ctypes.c_void_p, ctypes.c_void_p)
    return kind(compiled(_module()).get_function_address("contenders"))


def _module() -> ir.Module:
    module = ir.Module("draw")
    kinds = [I64, POINTER, _F64, I64, I64, POINTER, POINTER]
    function = ir.Function(module, ir.FunctionType(I64, kinds), "contenders")
    n, logits, temperature, seed, position, ids, bits = function.args
    b = ir.IRBuilder(function.append_basic_block())
    per_one, most, least, none = (b.fmul(temperature, _F64(value)) for value in (_LN2, _AT_MOST, _AT_LEAST, _LEAST))
    leading_zeros = intrinsic(b, "llvm.ctlz.i64", [I64, _I1], I64)

    def leading_ones(word: ir.Value) -> ir.Value:
        return b.call(leading_zeros, [b.or_(b.not_(word), I64(1 << 63 - _BITS)), _I1(0)])

    def of_ones(ones: ir.Value) -> ir.Value:
        return b.fmul(b.sitofp(ones, _F64), per_one)

    def token(id_: ir.Value, word: ir.Value, count: ir.Value, bound: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Keep it if it may win: how many are kept then, and what the best of all has at least."""
        logit = b.fpext(b.load(at(b, logits, b.mul(id_, I64(4))), typ=F32), _F64)
        ones = leading_ones(word)
        shared = of_ones(ones)
        may_win = b.fcmp_ordered(">=", b.fadd(logit, b.fadd(shared, most)), bound)
        # Written in any case, and if it is not to be kept, written over.
        place = b.mul(count, I64(8))
        b.store(id_, at(b, ids, place))
        b.store(word, at(b, bits, place))
        at_least = b.fadd(logit, b.select(b.icmp_signed(">", ones, I64(0)), b.fadd(shared, least), none))
        rises = b.and_(may_win, b.fcmp_ordered(">", at_least, bound))
        return b.add(count, b.zext(may_win, I64)), b.select(rises, at_least, bound)

    def words_of(block: ir.Value) -> list[ir.Value]:
        return _philox(b, [b.add(block, I64(1)), position, I64(0), I64(0)], [seed, I64(0)])

    def step(block: ir.Value, before: Sequence[ir.Value]) -> list[ir.Value]:
        count, bound = before
        words = words_of(block)
        first = b.mul(block, I64(_WORDS))
        # Mostly even the best logit with the best noise of all of them would not do.
        together = b.load(at(b, logits, b.mul(first, I64(4))), typ=_FLOATS, align=4)
        best = b.fpext(b.call(intrinsic(b, "llvm.vector.reduce.fmax.v4f32", [_FLOATS], F32), [together]), _F64)
        greatest = functools.reduce(lambda x, y: b.select(b.icmp_unsigned(">", x, y), x, y), words)
        at_most = b.fadd(best, b.fadd(of_ones(leading_ones(greatest)), most))
        looks, beside = b.append_basic_block(), b.append_basic_block()
        above = b.block
        b.cbranch(b.fcmp_ordered(">=", at_most, bound), looks, beside)
        b.position_at_end(looks)
        kept = count, bound
        for i, word in enumerate(words):
            kept = token(b.add(first, I64(i)), word, *kept)
        b.branch(beside)
        b.position_at_end(beside)
        after = []
        for unchanged, changed in zip(before, kept, strict=True):
            after.append(b.phi(unchanged.type))
            after[-1].add_incoming(unchanged, above)
            after[-1].add_incoming(changed, looks)
        return after

    whole = b.udiv(n, I64(_WORDS))
    count, bound = loop(b, whole, [I64(0), _F64(-np.finfo(np.float64).max)], step)
    first = b.mul(whole, I64(_WORDS))
    last = scratch(b, 2 * _WORDS)  # a float32 takes half a word
    for i, word in enumerate(words_of(whole)):
        b.store(word, at(b, last, 8 * i))

    def left_over(i: ir.Value, before: Sequence[ir.Value]) -> Sequence[ir.Value]:
        return token(b.add(first, i), b.load(at(b, last, b.mul(i, I64(8))), typ=I64), *before)

    count, _ = loop(b, b.sub(n, first), [count, bound], left_over)
    b.ret(count)
    return module


def _philox(b: ir.IRBuilder, counter: list[ir.Value], key: list[ir.Value]) -> list[ir.Value]:
    """The four words of a counter (Salmon et al., SC 2011, section 3.3)."""
    for turn in range(_ROUNDS):
        if turn:
            key = [b.add(word, I64(step)) for word, step in zip(key, _KEY_STEPS, strict=True)]
        products = [b.mul(b.zext(word, _I128), _I128(by)) for word, by in zip(counter[::2], _MULTIPLIERS, strict=True)]
        low = [b.trunc(product, I64) for product in products]
        high = [b.trunc(b.lshr(product, _I128(64)), I64) for product in products]
        counter = [
            b.xor(b.xor(high[1], counter[1]), key[0]),
            low[1],
            b.xor(b.xor(high[0], counter[3]), key[1]),
            low[0],
        ]
    return counter
