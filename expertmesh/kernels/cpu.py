"""The expert FFN on CPU cores: one product per run of pairs of one expert, in the fastest arithmetic that is invariant.

Owns the choice of a linear algebra routine, and the packed weights. The invariant: a pair's bits depend on nothing but
its row and its expert. No library promises that, so each `Arithmetic` is tried on the machine at hand, at the spec's
shape and the current number of threads, and the first that passes is taken. The order of preference is a rule and not
a race, so that like hosts choose alike and their replicas agree to the last bit.

Rounding: where products run in float32, a bfloat16 or float16 result is rounded once, at the end. In native bfloat16,
h and a are rounded too. Sums are float32 everywhere, and so is the activation.

Shapes: T token rows, P pairs, R rows of a block, H hidden, I intermediate, N = 2I with a gate, I without.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from expertmesh.kernels.activation import activate
from expertmesh.kernels.selfcheck import is_row_invariant, probe_rows, probe_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from expertmesh.kernels.spec import ExpertSpec, ExpertWeights

MAX_ROWS = 128
"""Rows of one product: enough to be bound by arithmetic, few enough that oneDNN keeps every row count's code cached."""

MAX_PAIRS = 1024
"""Pairs computed together: bounds the memory of h."""

SMALL_WEIGHTS = 2**16
"""Elements of `w_in` below which oneDNN's fixed cost per call (about 25 us) exceeds what its packing saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """One way to compute `x_RK @ w.T + b` for up to `max_rows` rows."""

    name: str
    dtype: torch.dtype
    """Of rows and weights in the products."""
    pack: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    num_bytes: Callable[[Tensor], int]
    """Of a packed weight."""
    max_rows: int = MAX_ROWS


class Packed(NamedTuple):
    """One expert in a slot."""

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None


class Block(NamedTuple):
    """Consecutive pairs of one slot."""

    slot: int
    start: int
    stop: int


class CpuKernel:
    """`ExpertKernel` on CPU cores."""

    def __init__(self, spec: ExpertSpec, num_slots: int) -> None:
        self.spec = spec
        self.num_slots = num_slots
        self.arithmetic, self.bytes_per_slot = choose_arithmetic(spec, torch.get_num_threads())
        self._slots: list[Packed | None] = [None] * num_slots

    def write(self, slot: int, weights: ExpertWeights) -> None:
        weights.check(self.spec)
        self._slots[slot] = _pack(self.arithmetic, weights)

    def clear(self, slot: int) -> None:
        self._slots[slot] = None

    @torch.no_grad()
    def run(self, x_TH: Tensor, row_P: Tensor, slot_P: Tensor) -> Tensor:
        parts_PH = [
            self._run(x_TH.index_select(0, row_P[start : start + MAX_PAIRS]), slot_P[start : start + MAX_PAIRS])
            for start in range(0, len(row_P), MAX_PAIRS)
        ]
        return torch.cat(parts_PH) if parts_PH else x_TH.new_empty(0, self.spec.hidden)

    def _run(self, x_PH: Tensor, slot_P: Tensor) -> Tensor:
        blocks = []
        for slot, start, stop in _blocks(slot_P, self.arithmetic.max_rows):
            packed = self._slots[slot]
            assert packed is not None, f"slot {slot} was never written"
            blocks.append((packed, start, stop))
        return _ffn(self.spec, self.arithmetic, blocks, x_PH)


@functools.cache
def choose_arithmetic(spec: ExpertSpec, num_threads: int) -> tuple[Arithmetic, int]:
    """The first invariant arithmetic for `spec` on this machine, and the bytes that a slot takes in it.

    Tries a real-sized expert, which takes from milliseconds to seconds: once per process, spec and thread count.
    """
    assert num_threads == torch.get_num_threads(), "the check must run as the kernel will"
    weights = probe_weights(spec)
    for arithmetic in _preferred(spec):
        packed = _pack(arithmetic, weights)
        x_RH = probe_rows(spec, arithmetic.max_rows)

        def ffn(x_RH: Tensor, arithmetic: Arithmetic = arithmetic, packed: Packed = packed) -> Tensor:
            return _ffn(spec, arithmetic, [(packed, 0, len(x_RH))], x_RH)

        if is_row_invariant(ffn, x_RH):
            return arithmetic, sum(arithmetic.num_bytes(tensor) for tensor in packed if tensor is not None)
    raise AssertionError("a product of one row is invariant by construction")


def _blocks(slot_P: Tensor, max_rows: int) -> Iterator[tuple[int, int, int]]:
    slots = slot_P.numpy()
    edges = [0, *(np.flatnonzero(slots[1:] != slots[:-1]) + 1).tolist(), len(slots)]
    for first, last in itertools.pairwise(edges):
        for start in range(first, last, max_rows):
            yield int(slots[start]), start, min(start + max_rows, last)


def _ffn(spec: ExpertSpec, arithmetic: Arithmetic, blocks: Sequence[tuple[Packed, int, int]], x_PH: Tensor) -> Tensor:
    linear, dtype = arithmetic.linear, arithmetic.dtype
    x_PH = x_PH.to(dtype)
    h_PN = torch.cat([linear(x_PH[start:stop], expert.w_in, expert.b_in) for expert, start, stop in blocks])
    a_PI = activate(h_PN.float(), spec.activation, gated=spec.gated).to(dtype)
    y_PH = torch.cat([linear(a_PI[start:stop], expert.w_out, expert.b_out) for expert, start, stop in blocks])
    return y_PH.to(getattr(torch, spec.dtype))


def _pack(arithmetic: Arithmetic, weights: ExpertWeights) -> Packed:
    def bias(b: Tensor | None) -> Tensor | None:
        return None if b is None else b.to(arithmetic.dtype, copy=True)

    return Packed(
        arithmetic.pack(weights.w_in.to(arithmetic.dtype)),
        arithmetic.pack(weights.w_out.to(arithmetic.dtype)),
        bias(weights.b_in),
        bias(weights.b_out),
    )


def _prepacked(x_RK: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_RK, w, b, "none", [], "")

def _by_fours(x_RK: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    missing = -len(x_RK) % 4
    return F.linear(F.pad(x_RK, (0, 0, 0, missing)), w, b)[: len(x_RK)] if missing else F.linear(x_RK, w, b)

PREPACKED=Arithmetic(name="prepacked", dtype=torch.float32, pack=torch.ops.mkldnn._reorder_linear_weight, linear=_prepacked, num_bytes=lambda t: t.nbytes)
FOURS=Arithmetic(name="fours", dtype=torch.float32, pack=torch.clone, linear=_by_fours, num_bytes=lambda t: t.nbytes)
def _preferred(spec): 
    return [PREPACKED]
