"""The expert FFN on CPU cores: two products per expert that has pairs, in the fastest arithmetic that is invariant.

Owns the choice of an arithmetic, and the packed weights. Its invariant: a pair's bits depend on nothing but its row and
its expert. No library promises that, so each `Arithmetic` is tried on the machine at hand, at the spec's shape and the
current number of threads, and the first that passes is taken. The order of preference is a rule and not a race, so that
like hosts choose alike and their replicas agree to the last bit.

Rounding: where products run in float32, a bfloat16 or float16 result is rounded once, at the end. Where their factors
are bfloat16, a is rounded to it too, and so is h where a library multiplies. Sums and the activation are float32
everywhere.

Shapes: T token rows, P pairs, R rows of one product, K columns, H hidden, I intermediate, N = 2I with a gate or I.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch.nn import functional as F

from expertmesh.allocator import huge_pages
from expertmesh.errors import ConfigError
from expertmesh.kernels.activation import activate
from expertmesh.kernels.blocks import MAX_PAIRS, cut, fill
from expertmesh.kernels.quantization import dequantize
from expertmesh.kernels.selfcheck import is_row_invariant, probe_rows, probe_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from expertmesh.kernels.spec import ExpertSpec, ExpertWeights

MAX_ROWS = 128
"""Rows of one product: enough to be bound by arithmetic, few enough that oneDNN keeps every row count's code cached."""

SMALL_WEIGHT = 2**16
"""Elements of `w_in` up to which oneDNN's fixed cost per call (about 25 us) outweighs what its packing saves."""


class Matrix(NamedTuple):
    """One of an expert's two weights with its bias, packed by an `Arithmetic`."""

    w: Tensor
    b: Tensor | None


Expert: TypeAlias = "tuple[Matrix, Matrix]"
"""Its weights in and out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """One way to compute `x_RK @ w.T + b` for blocks of rows, each with a weight and bias of its own."""

    name: str
    dtype: torch.dtype
    """Of rows, and of weights and biases before they are packed."""
    pack: Callable[[Tensor, Tensor | None], Matrix]
    """Of a dense weight and its bias. Never shares memory with its arguments."""
    num_bytes: Callable[[Tensor], int]
    """Of a packed weight or bias, padding included."""
    product: Callable[[Tensor, list[int], Sequence[Matrix]], Tensor]
    """x_RK, the rows of each block and its matrix -> y_RN, whose rows may be longer than N."""
    row_multiple: int = 1
    """Blocks are filled up to a multiple of this."""
    max_rows: int = MAX_ROWS
    """Of a block."""
    pack_codes: Callable[[Tensor, Tensor, Tensor | None], Matrix] | None = None
    """Of codes, scales and biases: where weights are held as they are stored. Else they are dequantized first."""
    ffn: Callable[[ExpertSpec], Ffn] | None = None
    """All of it in a way of its own, where it has one. Else it is made of two products."""
    in_pool: bool = False
    """Whether what is packed is plain memory, which may be moved: then it lies in huge pages."""


Ffn: TypeAlias = "Callable[[Sequence[Expert | None], Tensor, Tensor, Tensor], Tensor]"
"""The experts in all slots, x_TH, row_P and slot_P -> y_PH, as `ExpertKernel.run`."""


class CpuKernel:
    """`ExpertKernel` on CPU cores. Keep torch's number of threads as it was at construction."""

    def __init__(self, spec: ExpertSpec, num_slots: int, arithmetic: Arithmetic | None = None) -> None:
        """`arithmetic` is the one chosen for this machine, unless another is to be tried."""
        self.spec = spec
        self.num_slots = num_slots
        if arithmetic is None:
            self.arithmetic, self._slot_bytes = choose_arithmetic(spec, torch.get_num_threads())
        else:
            self.arithmetic = arithmetic
            self._slot_bytes = _num_bytes(arithmetic, _pack(spec, arithmetic, probe_weights(spec)))
        self._ffn = _ffn(spec, self.arithmetic)
        self._slots: list[Expert | None] = [None] * num_slots
        self._pool = huge_pages(num_slots * self._slot_bytes) if self.arithmetic.in_pool else None

    def write(self, slot: int, weights: ExpertWeights) -> None:
        weights.check(self.spec)
        expert = _pack(self.spec, self.arithmetic, weights)
        if self._pool is not None:
            first = slot * self._slot_bytes
            expert = _moved(expert, self._pool[first : first + self._slot_bytes])
        self._slots[slot] = expert

    def clear(self, slot: int) -> None:
        self._slots[slot] = None

    @torch.no_grad()
    def run(self, x_TH: Tensor, row_P: Tensor, slot_P: Tensor) -> Tensor:
        return self._ffn(self._slots, x_TH, row_P, slot_P)


@functools.cache
def choose_arithmetic(spec: ExpertSpec, num_threads: int) -> tuple[Arithmetic, int]:
    """The first invariant arithmetic for `spec` on this machine, and the bytes that a slot takes in it.

    Tries a real-sized expert, which takes from milliseconds to seconds: once per process, spec and number of threads.
    """
    assert num_threads == torch.get_num_threads(), "the check must run as the kernel will"
    weights = probe_weights(spec)
    x_RH = probe_rows(spec, MAX_ROWS)
    for arithmetic in _preferred(spec):
        try:
            expert = _pack(spec, arithmetic, weights)
            passed = is_row_invariant(functools.partial(_one, _ffn(spec, arithmetic), expert), x_RH)
        except RuntimeError:  # oneDNN refuses some dtypes and shapes on some processors, and says so only when called
            continue
        if passed:
            return arithmetic, _num_bytes(arithmetic, expert)
    if spec.portable:
        raise ConfigError(f"experts.portable: this processor has no vector instructions for {spec}; set it to false")
    raise ConfigError(
        f"no linear algebra on this machine computes a row of {spec} independently of the others: "
        "try another number of threads (OMP_NUM_THREADS) or another build of torch"
    )


def _ffn(spec: ExpertSpec, arithmetic: Arithmetic) -> Ffn:
    return functools.partial(_by_products, spec, arithmetic) if arithmetic.ffn is None else arithmetic.ffn(spec)


def _by_products(
    spec: ExpertSpec,
    arithmetic: Arithmetic,
    slots: Sequence[Expert | None],
    x_TH: Tensor,
    row_P: Tensor,
    slot_P: Tensor,
) -> Tensor:
    parts_PH = [
        _by_two_products(spec, arithmetic, slots, x_TH.index_select(0, row_p), slot_p)
        for row_p, slot_p in zip(torch.split(row_P, MAX_PAIRS), torch.split(slot_P, MAX_PAIRS), strict=True)
        if len(row_p) > 0
    ]
    if len(parts_PH) == 1:
        return parts_PH[0]
    return torch.cat(parts_PH) if parts_PH else x_TH.new_empty(0, spec.hidden)


def _by_two_products(
    spec: ExpertSpec, arithmetic: Arithmetic, slots: Sequence[Expert | None], x_PH: Tensor, slot_P: Tensor
) -> Tensor:
    product, dtype = arithmetic.product, arithmetic.dtype
    blocks = cut(slot_P.numpy(), arithmetic.max_rows)
    sizes, pairs = fill(blocks, arithmetic.row_multiple)
    ins, outs = zip(*(_written(slots, block.slot) for block in blocks), strict=True)

    filled = len(pairs) > len(x_PH)
    x_RH = (x_PH.index_select(0, torch.tensor(pairs)) if filled else x_PH).to(dtype)
    h_RN = product(x_RH, sizes, ins)[:, : spec.rows_in]
    # One call for all experts, as an element's activation does not depend on its place.
    a_RI = activate(h_RN.float(), spec.activation, gated=spec.gated).to(dtype)
    y_RH = product(a_RI, sizes, outs)[:, : spec.hidden]
    if filled:
        parts = zip(torch.split(y_RH, sizes), blocks, strict=True)
        y_RH = torch.cat([y[: block.stop - block.first] for y, block in parts])
    return y_RH.to(x_PH.dtype).contiguous()


def _one(ffn: Ffn, expert: Expert, x_RH: Tensor) -> Tensor:
    """Of the rows of one expert."""
    return ffn([expert], x_RH, torch.arange(len(x_RH)), torch.zeros(len(x_RH), dtype=torch.int64))


def _written(slots: Sequence[Expert | None], slot: int) -> Expert:
    expert = slots[slot]
    assert expert is not None, f"slot {slot} was never written"
    return expert


def _pack(spec: ExpertSpec, arithmetic: Arithmetic, weights: ExpertWeights) -> Expert:
    if arithmetic.pack_codes is not None:
        assert weights.s_in is not None
        assert weights.s_out is not None
        into = arithmetic.pack_codes(weights.w_in, weights.s_in, weights.b_in)
        return into, arithmetic.pack_codes(weights.w_out, weights.s_out, weights.b_out)
    plain = dequantize(weights, spec)
    b_in, b_out = (None if tensor is None else tensor.to(arithmetic.dtype) for tensor in (plain.b_in, plain.b_out))
    return (
        arithmetic.pack(plain.w_in.to(arithmetic.dtype), b_in),
        arithmetic.pack(plain.w_out.to(arithmetic.dtype), b_out),
    )


def _num_bytes(arithmetic: Arithmetic, expert: Expert) -> int:
    return sum(arithmetic.num_bytes(tensor) for matrix in expert for tensor in matrix if tensor is not None)


def _moved(expert: Expert, memory: Tensor) -> Expert:
    """The same in `memory`, which it fills. Its tensors are of uint8, and its biases are among the weights."""
    w_in, w_out = expert[0].w, expert[1].w
    into, out_of = memory[: w_in.nbytes].view_as(w_in), memory[w_in.nbytes :].view_as(w_out)
    return Matrix(into.copy_(w_in), None), Matrix(out_of.copy_(w_out), None)


def has_llvm() -> bool:
    """Whether machine code of our own can be made here."""
    return importlib.util.find_spec("llvmlite") is not None


def _preferred(spec: ExpertSpec) -> Iterator[Arithmetic]:
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if spec.portable:
        _check_portable(spec)
        yield from _by_ieee_rules(spec)
        return
    in_bfloat16 = spec.dtype == "bfloat16" and spec.format.is_dense
    # Units for bfloat16 matrices do an order more than float32 can in prompts' large products.
    if has_onednn and in_bfloat16 and torch.cpu._is_amx_tile_supported():
        yield _prepacked("bfloat16")
    if has_llvm():
        if in_bfloat16 and torch.cpu._is_avx512_bf16_supported():
            yield _panels_of_pairs()
        yield from _by_ieee_rules(spec)
    if spec.format.is_dense and spec.hidden * spec.rows_in <= SMALL_WEIGHT:
        yield BY_FOURS
    if has_onednn:
        if in_bfloat16 and torch.cpu._is_avx512_bf16_supported():
            yield _prepacked("bfloat16")
        yield _prepacked("float32")
    yield BY_FOURS
    yield ONE_ROW


def _by_ieee_rules(spec: ExpertSpec) -> Iterator[Arithmetic]:
    """Machine code that gives the same bits everywhere. Codes stay as they are stored, or become what they stand for,
    in float32, as no shorter type holds it."""
    if spec.format.is_dense:
        yield _panels(spec.dtype)
        return
    if not spec.format.group:
        yield _panels_of_codes(spec.format.code)
    yield _panels("float32")


def _check_portable(spec: ExpertSpec) -> None:
    """Raises ConfigError if a library would compute any of it: none says how it rounds."""
    if not has_llvm():
        raise ConfigError("experts.portable: hosts need llvmlite for it; install it (pip install llvmlite)")
    from expertmesh.kernels.cpu_row_code import activation_code

    if activation_code(spec.activation, gated=spec.gated) is None:
        raise ConfigError(f"experts.portable: {spec.activation.name} is not computed alike everywhere; set it to false")


def _panels_of_codes(code: str) -> Arithmetic:
    from expertmesh.kernels.cpu_panels import pack_codes

    def packed(codes_NK: Tensor, s_1N: Tensor, b_N: Tensor | None) -> Matrix:
        return Matrix(pack_codes(codes_NK, s_1N[0], b_N), None)

    return replace(_panels(code), pack_codes=packed)


def _panels_of_pairs() -> Arithmetic:
    """Twice as fast as bfloat16 weights that are widened, where arithmetic is what holds it up."""
    from expertmesh.kernels.cpu_code import PAIRS
    from expertmesh.kernels.cpu_panels import pack_pairs

    def packed(w_NK: Tensor, b_N: Tensor | None) -> Matrix:
        return Matrix(pack_pairs(w_NK, b_N), None)

    return replace(_panels(PAIRS), dtype=torch.bfloat16, pack=packed)


def _panels(form: str) -> Arithmetic:
    """Our own machine code. Weights stay in the dtype of that name, or in codes."""
    from expertmesh.kernels import cpu_panels

    def packed(w_NK: Tensor, b_N: Tensor | None) -> Matrix:
        return Matrix(cpu_panels.pack(getattr(torch, form), w_NK, b_N), None)

    def product(x_RK: Tensor, sizes: list[int], matrices: Sequence[Matrix]) -> Tensor:
        return cpu_panels.multiply(form, x_RK, sizes, [matrix.w for matrix in matrices])

    return Arithmetic(
        name=f"panels of {form}",
        dtype=torch.float32,
        pack=packed,
        num_bytes=lambda w: w.nbytes,
        product=product,
        ffn=lambda spec: cpu_panels.Ffn(spec, form),
        max_rows=MAX_PAIRS,
        in_pool=True,
    )


def _prepacked(dtype: str) -> Arithmetic:
    """oneDNN with the weight in its own blocked layout. Weights of odd sizes are padded, which `num_bytes` counts."""

    def pack(w_NK: Tensor, b_N: Tensor | None) -> Matrix:
        return Matrix(torch.ops.mkldnn._reorder_linear_weight(w_NK), _cloned(b_N))

    return Arithmetic(
        name=f"prepacked {dtype}",
        dtype=getattr(torch, dtype),
        pack=pack,
        num_bytes=lambda t: torch.ops.mkldnn._nbytes(t) if t.is_mkldnn else t.nbytes,
        product=one_by_one(_prepacked_linear),
    )


def _prepacked_linear(x_RK: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_RK, w, b, "none", [], "")  # type: ignore[no-any-return]


def plain(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
    row_multiple: int = 1,
    max_rows: int = MAX_ROWS,
) -> Arithmetic:
    """`linear` over weights as they are."""
    return Arithmetic(
        name=name,
        dtype=dtype,
        pack=lambda w_NK, b_N: Matrix(w_NK.clone(), _cloned(b_N)),
        num_bytes=lambda t: t.nbytes,
        product=one_by_one(linear),
        row_multiple=row_multiple,
        max_rows=max_rows,
    )


def one_by_one(
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Callable[[Tensor, list[int], Sequence[Matrix]], Tensor]:
    """A product that calls `linear` for each block."""

    def product(x_RK: Tensor, sizes: list[int], matrices: Sequence[Matrix]) -> Tensor:
        blocks = zip(torch.split(x_RK, sizes), matrices, strict=True)
        return torch.cat([linear(x, matrix.w, matrix.b) for x, matrix in blocks])

    return product


def _cloned(b_N: Tensor | None) -> Tensor | None:
    return None if b_N is None else b_N.clone()


# MKL takes other paths for leftover rows, for fewer than four, and for a row that does not begin where a tensor would.
BY_FOURS = plain("plain float32, rows by fours", row_multiple=4)
ONE_ROW = plain("plain float32, row by row", max_rows=1, linear=lambda x, w, b: F.linear(x.clone(), w, b))
