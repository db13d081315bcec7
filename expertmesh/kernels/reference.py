"""The oracle of every kernel: one pair at a time, in float32, with no thought of speed.

Owns a float32 copy of each expert. Its invariant holds by construction: a pair is computed alone. Rows and weights are
upcast, codes are dequantized, h, a and y are float32, and y is rounded to the spec's dtype at the end: the only
rounding but float32's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expertmesh.kernels.activation import activate
from expertmesh.kernels.quantization import dequantize
from expertmesh.kernels.spec import ExpertWeights

if TYPE_CHECKING:
    from torch import Tensor

    from expertmesh.kernels.spec import ExpertSpec


MAX_ROWS = 1024
"""Of a weight that are upcast at a time."""


class ReferenceKernel:
    """`ExpertKernel` as plainly as it can be written."""

    def __init__(self, spec: ExpertSpec, num_slots: int) -> None:
        self.spec = spec
        self.num_slots = num_slots
        self._experts: dict[int, ExpertWeights] = {}

    def write(self, slot: int, weights: ExpertWeights) -> None:
        weights.check(self.spec)
        plain = dequantize(weights, self.spec)
        self._experts[slot] = ExpertWeights(
            *(None if tensor is None else tensor.to(torch.float32, copy=True) for tensor in plain)  # type: ignore[arg-type]
        )

    def clear(self, slot: int) -> None:
        self._experts.pop(slot, None)

    @torch.no_grad()
    def run(self, x_TH: Tensor, row_P: Tensor, slot_P: Tensor) -> Tensor:
        y_PH = torch.empty(len(row_P), self.spec.hidden)
        for pair, (row, slot) in enumerate(zip(row_P.tolist(), slot_P.tolist(), strict=True)):
            y_PH[pair] = compute_row(self.spec, self._experts[slot], x_TH[row].float())
        return y_PH.to(x_TH.dtype)


def compute_row(spec: ExpertSpec, expert: ExpertWeights, x_H: Tensor) -> Tensor:
    """One expert's float32 answer to one float32 row. The weights are dense, of any dtype."""
    h_N = _product(expert.w_in, x_H)
    if expert.b_in is not None:
        h_N = h_N + expert.b_in
    a_I = activate(h_N, spec.activation, gated=spec.gated)
    y_H = _product(expert.w_out, a_I)
    return y_H if expert.b_out is None else y_H + expert.b_out


def _product(w_NK: Tensor, x_K: Tensor) -> Tensor:
    """In float32, without a float32 copy of all of w_NK."""
    if w_NK.dtype == torch.float32:
        return w_NK @ x_K
    return torch.cat([block.float() @ x_K for block in torch.split(w_NK, MAX_ROWS)])
