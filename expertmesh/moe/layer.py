"""One MoE layer as the model calls it: exchange, then the weighted sum in fixed order.

Shapes: T tokens, K experts per token, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expertmesh.kernels import cpu_combine
from expertmesh.kernels.spec import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from expertmesh.moe.exchange import Exchange


def combine(rows_TKH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Sum each token's expert rows with its gate weights: y_TH in the rows' dtype.

    Products and sums are float32 (float64 if rows are), one k after the other in the gate's order, rounded once.
    Element-wise steps on purpose: a reduction kernel may pick another order for another shape, and the answer must not
    depend on the batch. On a CPU that is one pass of machine code, to the same bits, where no gradient is asked for.
    """
    dtype = str(rows_TKH.dtype).removeprefix("torch.")
    if rows_TKH.device.type == "cpu" and dtype in DTYPES and not (rows_TKH.requires_grad or weights_TK.requires_grad):
        weights = weights_TK.to(torch.float32).contiguous()
        return cpu_combine.combine(rows_TKH.contiguous(), weights)
    wide = torch.promote_types(rows_TKH.dtype, torch.float32)
    weights = weights_TK.to(wide).unsqueeze(-1)
    total = rows_TKH[:, 0].to(wide) * weights[:, 0]
    for k in range(1, rows_TKH.shape[1]):
        total += rows_TKH[:, k].to(wide) * weights[:, k]
    return total.to(rows_TKH.dtype)


class MoeLayer:
    """The experts of one layer, elsewhere: what a model's experts module calls in their place."""

    def __init__(self, exchange: Exchange, layer: int) -> None:
        self._exchange = exchange
        self._layer = layer

    def __call__(self, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The layer's routed output y_TH, on x's device and in its dtype. Errors are the exchange's."""
        rows = self._exchange.run(self._layer, x_TH.cpu(), index_TK.cpu()).to(x_TH.device)
        return combine(rows, weights_TK)

    def begin(self, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> Callable[[], torch.Tensor]:
        """As a call, in two steps: what is returned waits for y_TH. x_TH must not change in between."""
        finish = self._exchange.begin(self._layer, x_TH.cpu(), index_TK.cpu())
        return lambda: combine(finish().to(x_TH.device), weights_TK)
