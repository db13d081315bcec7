"""An expert's feed-forward network as torch differentiates it, for training. Any float dtype, any device.

Knows neither slots nor hosts. Its invariant: it computes what `activation` and a kernel do, up to rounding; but where
those keep an element's result apart from its place in the tensor, this only gives the same for the same call.

Shapes: R rows, H hidden, I intermediate, N = 2I with a gate, I without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from expertmesh.kernels.spec import Activation, ExpertSpec, ExpertWeights


def expert_ffn(spec: ExpertSpec, expert: ExpertWeights, x_RH: Tensor) -> Tensor:
    """One expert's y_RH, in the dtype of x_RH and of the weights."""
    h_RN = F.linear(x_RH, expert.w_in, expert.b_in)
    return F.linear(_activate(h_RN, spec.activation, gated=spec.gated), expert.w_out, expert.b_out)


def _activate(h_RN: Tensor, activation: Activation, *, gated: bool) -> Tensor:
    if not gated:
        return _POINTWISE[activation.name](h_RN)
    gate_RI, up_RI = h_RN.chunk(2, dim=-1)
    if activation.name in _POINTWISE:
        return _POINTWISE[activation.name](gate_RI) * up_RI
    return _GATED[activation.name](gate_RI, up_RI, activation.limit, activation.alpha)


_POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


def _swiglu_oai(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(gate * alpha) * (up.clamp(-limit, limit) + 1)


_GATED: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "swiglu_clamped": lambda gate, up, limit, _: F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit),
    "swiglu_bounded": lambda gate, up, limit, _: F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit),
    "swiglu_oai": _swiglu_oai,
    "swiglu_softcapped": lambda gate, up, limit, alpha: (
        alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate) * limit * torch.tanh(up / limit)
    ),
}
