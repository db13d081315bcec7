"""What a layer asks of its experts, and experts that a mesh serves: for inference, without gradients of theirs.

Shapes: T tokens, K experts per token, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch.autograd.function import once_differentiable

from expertmesh.attachment import Attachment, look_up
from expertmesh.credentials import shared_token
from expertmesh.errors import ConfigError
from expertmesh.moe.exchange import Exchange
from expertmesh.transport.network import NetworkTransport

if TYPE_CHECKING:
    from typing import Any

    from expertmesh.tls import TlsFiles


class Experts(Protocol):
    """The experts of one or several MoE layers, wherever they are."""

    hidden: int
    """Width of a row."""
    dtype: torch.dtype
    """Of a row."""
    num_experts: tuple[int, ...]
    """Per layer."""

    def rows(self, layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """Each chosen expert's row, rows_TKH: neither weighted nor summed, on x's device. Every index is an expert's.

        Differentiable as far as the experts are.
        """
        ...


class ServedExperts:
    """The experts of the mesh whose gateway is at `address`. A context manager, and closed by hand otherwise."""

    def __init__(self, address: str, *, token: str | None = None, tls: TlsFiles | None = None) -> None:
        """`token` and `tls` as for `expertmesh.attach`. Raises ConfigError when no mesh answers there."""
        served = look_up(address)
        self.hidden = served.hidden
        self.dtype: torch.dtype = getattr(torch, served.dtype)
        self.num_experts = served.placement.num_experts
        self._exchange = Exchange(NetworkTransport(token or shared_token(), tls=tls), served.placement)
        self._attachment = Attachment(self._exchange, address)

    def rows(self, layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """Errors are the exchange's. Its gradient by x_TH is refused when it is asked for."""
        rows: torch.Tensor = _Fixed.apply(x_TH, index_TK, layer, self._exchange)  # type: ignore[no-untyped-call]
        return rows

    def close(self) -> None:
        """Break the connections. Idempotent."""
        self._attachment.close()

    def __enter__(self) -> ServedExperts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Fixed(torch.autograd.Function):
    """An exchange that has no way back."""

    @staticmethod
    def forward(_ctx: Any, x_TH: torch.Tensor, index_TK: torch.Tensor, layer: int, exchange: Exchange) -> torch.Tensor:
        return exchange.run(layer, x_TH.detach().cpu(), index_TK.cpu()).to(x_TH.device)

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, *_grads: torch.Tensor) -> tuple[None, ...]:
        raise ConfigError(
            "these experts are served, not trained: they give no gradients by their rows. Use TrainedExperts, or give "
            "the layer rows that need none (x.detach())"
        )
