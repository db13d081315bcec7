"""The expert FFN on CPU cores: one product per run of pairs of one expert, in the fastest arithmetic that is invariant.

Owns the choice of a linear algebra routine, and the packed weights. Its invariant: a pair's bits depend on nothing but
its row and its expert. No library promises that, so each `Arithmetic` is tried on the machine at hand, at the spec's
shape and the current number of threads, and the first that passes is taken. The order of preference is a rule and not
a race, so that like hosts choose alike and their replicas agree to the last bit.

Rounding: where products run in float32, a bfloat16 or float16 result is rounded once, at the end. Where they run in
bfloat16, h and a are rounded to it too. Sums and the activation are float32 everywhere.

Shapes: T token rows, P pairs, R rows of one product, K columns, H hidden, I intermediate, N = 2I with a gate or I.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from expertmesh.errors import ConfigError
from expertmesh.kernels.activation import activate
from expertmesh.kernels.blocks import cut, fill
from expertmesh.kernels.selfcheck import is_row_invariant, probe_rows, probe_weights
from expertmesh.kernels.spec import ExpertWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from expertmesh.kernels.spec import ExpertSpec

MAX_ROWS = 128
"""Rows of one product: enough to be bound by arithmetic, few enough that oneDNN keeps every row count's code cached."""

MAX_PAIRS = 1024
"""Pairs computed together, which bounds the memory that h takes."""

SMALL_WEIGHT = 2**16
"""Elements of `w_in` up to which oneDNN's fixed cost per call (about 25 us) outweighs what its packing saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """One way to compute `x_RK @ w.T + b`."""

    name: str
    dtype: torch.dtype
    """Of rows and weights in the products."""
    pack: Callable[[Tensor], Tensor]
    num_bytes: Callable[[Tensor], int]
    """Of a packed weight, padding included."""
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    row_multiple: int = 1
    """Blocks are filled up to a multiple of this."""
    max_rows: int = MAX_ROWS


class CpuKernel:
    """`ExpertKernel` on CPU cores. Keep torch's number of threads as it was at construction."""

    def __init__(self, spec: ExpertSpec, num_slots: int) -> None:
        self.spec = spec
        self.num_slots = num_slots
        self.arithmetic, _ = choose_arithmetic(spec, torch.get_num_threads())
        self._slots: list[ExpertWeights | None] = [None] * num_slots

    def write(self, slot: int, weights: ExpertWeights) -> None:
        weights.check(self.spec)
        self._slots[slot] = _pack(self.arithmetic, weights)

    def clear(self, slot: int) -> None:
        self._slots[slot] = None

    @torch.no_grad()
    def run(self, x_TH: Tensor, row_P: Tensor, slot_P: Tensor) -> Tensor:
        parts_PH = [
            _ffn(self.spec, self.arithmetic, self._slots, x_TH.index_select(0, row_p), slot_p)
            for row_p, slot_p in zip(torch.split(row_P, MAX_PAIRS), torch.split(slot_P, MAX_PAIRS), strict=True)
            if len(row_p) > 0
        ]
        return torch.cat(parts_PH) if parts_PH else x_TH.new_empty(0, self.spec.hidden)


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
            expert = _pack(arithmetic, weights)
            passed = is_row_invariant(functools.partial(_ffn_of_one, spec, arithmetic, expert), x_RH)
        except RuntimeError:  # oneDNN refuses some dtypes and shapes on some processors, and says so only when called
            continue
        if passed:
            biases = [bias for bias in (expert.b_in, expert.b_out) if bias is not None]
            return arithmetic, sum(map(arithmetic.num_bytes, expert[:2])) + sum(bias.nbytes for bias in biases)
    raise ConfigError(
        f"no linear algebra on this machine computes a row of {spec} independently of the others: "
        "try another number of threads (OMP_NUM_THREADS) or another build of torch"
    )


def _ffn(
    spec: ExpertSpec, arithmetic: Arithmetic, slots: Sequence[ExpertWeights | None], x_PH: Tensor, slot_P: Tensor
) -> Tensor:
    linear, dtype = arithmetic.linear, arithmetic.dtype
    blocks = cut(slot_P.numpy(), arithmetic.max_rows)
    sizes, pairs = fill(blocks, arithmetic.row_multiple)
    experts = [_written(slots, block.slot) for block in blocks]

    x_RH = (x_PH if len(pairs) == len(x_PH) else x_PH.index_select(0, torch.tensor(pairs))).to(dtype)
    h_RN = torch.cat([linear(x, e.w_in, e.b_in) for x, e in zip(torch.split(x_RH, sizes), experts, strict=True)])
    # One call for all experts, as an element's activation does not depend on its place.
    a_RI = activate(h_RN.float(), spec.activation, gated=spec.gated).to(dtype)
    y_RH = [linear(a, e.w_out, e.b_out) for a, e in zip(torch.split(a_RI, sizes), experts, strict=True)]
    y_PH = torch.cat([y[: block.stop - block.first] for y, block in zip(y_RH, blocks, strict=True)])
    return y_PH.to(x_PH.dtype)


def _ffn_of_one(spec: ExpertSpec, arithmetic: Arithmetic, expert: ExpertWeights, x_RH: Tensor) -> Tensor:
    return _ffn(spec, arithmetic, [expert], x_RH, torch.zeros(len(x_RH), dtype=torch.int64))


def _written(slots: Sequence[ExpertWeights | None], slot: int) -> ExpertWeights:
    expert = slots[slot]
    assert expert is not None, f"slot {slot} was never written"
    return expert


def _pack(arithmetic: Arithmetic, weights: ExpertWeights) -> ExpertWeights:
    dtype = arithmetic.dtype
    return ExpertWeights(
        arithmetic.pack(weights.w_in.to(dtype)),
        arithmetic.pack(weights.w_out.to(dtype)),
        None if weights.b_in is None else weights.b_in.to(dtype, copy=True),
        None if weights.b_out is None else weights.b_out.to(dtype, copy=True),
    )


def _preferred(spec: ExpertSpec) -> Iterator[Arithmetic]:
    if spec.hidden * spec.rows_in <= SMALL_WEIGHT:
        yield BY_FOURS
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        if spec.dtype == "bfloat16" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
            yield _prepacked("bfloat16")
        yield _prepacked("float32")
    yield BY_FOURS
    yield ONE_ROW


def _prepacked(dtype: str) -> Arithmetic:
    """oneDNN with the weight in its own blocked layout. Weights of odd sizes are padded, which `num_bytes` counts."""
    return Arithmetic(
        name=f"prepacked {dtype}",
        dtype=getattr(torch, dtype),
        pack=torch.ops.mkldnn._reorder_linear_weight,
        num_bytes=torch.ops.mkldnn._nbytes,
        linear=_prepacked_linear,
    )


def _prepacked_linear(x_RK: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_RK, w, b, "none", [], "")  # type: ignore[no-any-return]


BY_FOURS = Arithmetic(
    name="plain float32, rows by fours",  # MKL takes other paths for leftover rows and for fewer than four
    dtype=torch.float32,
    pack=torch.clone,
    num_bytes=lambda w: w.nbytes,
    linear=F.linear,
    row_multiple=4,
)
ONE_ROW = Arithmetic(
    name="plain float32, row by row",
    dtype=torch.float32,
    pack=torch.clone,
    num_bytes=lambda w: w.nbytes,
    linear=F.linear,
    max_rows=1,
)
