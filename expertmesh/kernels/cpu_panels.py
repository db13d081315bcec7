"""Weights in panels, in the spec's dtype or its codes, the product with them, and the whole FFN, on torch's threads.

Owns the packing and the division of work among threads; the machine code is `cpu_code`'s and `cpu_row_code`'s, and so
is the invariant: an element's bits depend on its row and its column alone, whoever computes it beside whatever else.

Shapes: R rows, K columns, N results of a row, and those of `cpu`. A weight is [panels, bytes of a panel], in
`cpu_code`'s layout.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.nn import functional as F

from expertmesh.allocator import huge_pages
from expertmesh.kernels.activation import activate
from expertmesh.kernels.blocks import MAX_PAIRS, runs
from expertmesh.kernels.cpu_code import COLUMNS, PAIRS, Call, product_code
from expertmesh.kernels.cpu_ir import LANES
from expertmesh.kernels.cpu_row_code import Rows, activation_code, gather_code, round_code

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from expertmesh.kernels.cpu import Expert
    from expertmesh.kernels.cpu_ir import Work
    from expertmesh.kernels.spec import ExpertSpec


MAX_CHUNK = 8
"""Panels that a thread takes at a time, at most. A thread that goes on to the next panel has fetched it already."""
CHUNKS_PER_THREAD = 4
"""At least, where there are panels enough: so that a thread that was held up leaves its work to the others."""
MIN_ELEMENTS = 2**14
"""That a thread takes at a time where it computes them one by one: another is not woken for less."""

HEAD_BYTES = 4 * COLUMNS


def pack(dtype: torch.dtype, w_NK: Tensor, b_N: Tensor | None) -> Tensor:
    """Panels of weights in `dtype`, which must hold them exactly; the last one is filled with zeros."""
    lines = _lines(w_NK.to(dtype))
    if dtype == torch.bfloat16:
        lines = lines.reshape(*lines.shape[:2], -1, 2, LANES).transpose(-1, -2)
    return _panels(len(w_NK), [b_N], lines)


def pack_pairs(w_NK: Tensor, b_N: Tensor | None) -> Tensor:
    """Panels of bfloat16 weights two by two, an odd last one with a zero."""
    lines = _lines(F.pad(w_NK.to(torch.bfloat16), (0, w_NK.shape[1] % 2)))
    pairs = lines.reshape(len(lines), -1, 2, COLUMNS).transpose(-1, -2)
    return _panels(len(w_NK), [b_N], pairs)


def pack_codes(codes_NK: Tensor, s_N: Tensor, b_N: Tensor | None) -> Tensor:
    """Panels of codes of one byte, which each row's scale turns into its weights."""
    return _panels(len(codes_NK), [b_N, s_N], _lines(codes_NK.view(torch.uint8)))


def _lines(w_NK: Tensor) -> Tensor:
    """[panels, K, COLUMNS], where the columns that fill the last panel up are zeros."""
    num_results, depth = w_NK.shape
    return F.pad(w_NK, (0, 0, 0, -num_results % COLUMNS)).view(-1, COLUMNS, depth).transpose(1, 2)


def _panels(num_results: int, heads: Sequence[Tensor | None], lines: Tensor) -> Tensor:
    """[panels, bytes]: what each begins with, and its lines."""
    parts = [_head(values_N, num_results) for values_N in heads]
    return torch.cat([*parts, lines.contiguous().view(torch.uint8).view(len(lines), -1)], dim=1)


def _head(values_N: Tensor | None, num_results: int) -> Tensor:
    """Biases or scales as each panel begins with them; zeros where there are none."""
    num_panels = -(-num_results // COLUMNS)
    filled = torch.zeros(num_panels * COLUMNS)
    if values_N is not None:
        filled[:num_results] = values_N
    return filled.view(torch.uint8).view(num_panels, HEAD_BYTES)


_Block: TypeAlias = "tuple[Tensor, tuple[int, int]]"
"""A weight, and of its rows the first and the end."""


def multiply(form: str, x_RK: Tensor, sizes: list[int], weights: Sequence[Tensor]) -> Tensor:
    """y_RN, where N is filled up to whole panels: `sizes` rows of x_RK by each of `weights` of `form`, in order."""
    if form == PAIRS:
        x_RK = x_RK.to(torch.bfloat16)
        if x_RK.shape[1] % 2:
            x_RK = F.pad(x_RK, (0, 1))
    x_RK = x_RK.contiguous()
    y_RN = torch.empty(len(x_RK), len(weights[0]) * COLUMNS)
    spans = pairwise(accumulate(sizes, initial=0))
    _multiply(product_code(form), x_RK, list(zip(weights, spans, strict=True)), y_RN)
    return y_RN


def _multiply(code: int, x_RK: Tensor, blocks: Sequence[_Block], y_RN: Tensor) -> None:
    """Write the rows of y_RN, by the product's code at that address."""
    per_block = len(blocks[0][0])
    num_panels = per_block * len(blocks)
    num_threads = torch.get_num_threads()
    table = array("q", [number for w, span in blocks for number in (w.data_ptr(), *span)])
    call = Call(
        next=0,
        end=num_panels,
        chunk=min(MAX_CHUNK, -(-num_panels // (CHUNKS_PER_THREAD * num_threads))),
        panels_per_block=per_block,
        depth=x_RK.stride(0) * x_RK.itemsize // 4,
        width=y_RN.shape[1],
        x=x_RK.data_ptr(),
        y=y_RN.data_ptr(),
        blocks=table.buffer_info()[0],
    )
    on_threads(code, call, num_threads)


class Ffn:
    """The FFN of the pairs of a call: between the first row and the last, all in machine code where it can be.

    An activation that `cpu_row_code` does not have is torch's. One thread uses it, as it keeps what it computes in.
    """

    def __init__(self, spec: ExpertSpec, form: str) -> None:
        """`form` is the weights'. Raises RuntimeError as `product_code` does."""
        self._spec = spec
        self._product = product_code(form)
        factors = "bfloat16" if form == PAIRS else "float32"
        self._gather, self._round = gather_code(spec.dtype, factors), round_code(spec.dtype)
        self._activation = activation_code(spec.activation, gated=spec.gated, written=factors)
        columns = 4 // getattr(torch, factors).itemsize
        widths = [-(-width // columns) for width in (spec.hidden, spec.intermediate)]  # in 4 bytes
        widths += [_filled(spec.rows_in), _filled(spec.hidden)]
        memory = huge_pages(4 * MAX_PAIRS * sum(widths)).view(torch.float32)
        parts = torch.split(memory, [MAX_PAIRS * width for width in widths])
        x, a, h, y = (part.view(MAX_PAIRS, width) for part, width in zip(parts, widths, strict=True))
        # What fills an odd row of bfloat16 up is never written, and stays zero.
        self._x, self._a = x.view(getattr(torch, factors)), a.view(getattr(torch, factors))
        self._h, self._y = h, y

    def __call__(self, slots: Sequence[Expert | None], x_TH: Tensor, row_P: Tensor, slot_P: Tensor) -> Tensor:
        y_PH = torch.empty(len(row_P), self._spec.hidden, dtype=x_TH.dtype)
        parts = (torch.split(tensor, MAX_PAIRS) for tensor in (row_P, slot_P, y_PH))
        for row_p, slot_p, y_pH in zip(*parts, strict=True):
            if len(row_p) > 0:
                self._run(slots, x_TH, row_p, slot_p.tolist(), y_pH)
        return y_PH

    def _run(
        self, slots: Sequence[Expert | None], x_TH: Tensor, row_P: Tensor, slot_P: list[int], y_PH: Tensor
    ) -> None:
        num_pairs = len(slot_P)
        x, a, h_PN, unrounded_PH = (buffer[:num_pairs] for buffer in (self._x, self._a, self._h, self._y))
        x_PH, a_PI = x[:, : self._spec.hidden], a[:, : self._spec.intermediate]
        ins: list[_Block] = []
        outs: list[_Block] = []
        for block in runs(slot_P):
            expert = slots[block.slot]
            assert expert is not None, f"slot {block.slot} was never written"
            for blocks, matrix in zip((ins, outs), expert, strict=True):
                blocks.append((matrix.w, (block.first, block.stop)))
        make_rows(self._gather, x_TH, x_PH, index=row_P.contiguous())
        _multiply(self._product, x_PH, ins, h_PN)
        if self._activation is None:
            a_PI.copy_(activate(h_PN[:, : self._spec.rows_in], self._spec.activation, gated=self._spec.gated))
        else:
            make_rows(self._activation, h_PN, a_PI)
        _multiply(self._product, a_PI, outs, unrounded_PH)
        make_rows(self._round, unrounded_PH, y_PH)


def make_rows(code: int, source: Tensor, target: Tensor, *, index: Tensor | None = None) -> None:
    """Write target [rows, elements] out of rows of `source`, by `cpu_row_code` at that address."""
    num_rows, count = target.shape
    num_threads = torch.get_num_threads()
    chunk = max(MIN_ELEMENTS // count + 1, -(-num_rows // (CHUNKS_PER_THREAD * num_threads)))
    rows = Rows(
        next=0,
        end=num_rows,
        chunk=chunk,
        source=source.data_ptr(),
        source_bytes=source.stride(0) * source.itemsize,
        target=target.data_ptr(),
        target_bytes=target.stride(0) * target.itemsize,
        count=count,
        index=None if index is None else index.data_ptr(),
    )
    on_threads(code, rows, min(num_threads, -(-num_rows // chunk)))


def _filled(num_results: int) -> int:
    """Up to whole panels."""
    return -(-num_results // COLUMNS) * COLUMNS


_Code = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_function = functools.cache(_Code)


@functools.cache
def _parallel() -> Callable[..., None] | None:
    """OpenMP's entry for compiled parallel regions, of the runtime whose threads torch uses; None where it has none."""
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if entry is not None:
        entry.argtypes, entry.restype = [_Code, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return entry


def shared_out(num_turns: int, num_numbers: int, least: int) -> tuple[int, int]:
    """Turns that a thread takes at a time, and how many threads: one for less than `least` numbers."""
    num_threads = torch.get_num_threads() if num_numbers >= least else 1
    return -(-num_turns // (CHUNKS_PER_THREAD * num_threads)), num_threads


def on_threads(code: int, work: Work, num_threads: int) -> None:
    """Run the code on `work` to its end, on torch's own threads: others would contend with them for the cores."""
    function, address, parallel = _function(code), ctypes.addressof(work), _parallel()
    if num_threads == 1 or parallel is None:
        function(address)
    else:
        parallel(function, address, num_threads, 0)
