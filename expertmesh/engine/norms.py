"""The dense model's root-mean-square norms on CPU cores, in machine code instead of seven calls of torch.

Owns how such a norm is recognized: transformers has one class of them per architecture, most of them alike, and nothing
that says so. Invariant: a layer is left alone unless, on trial, it computes the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expertmesh.engine.stand_ins import stand_in
from expertmesh.kernels.cpu import has_llvm
from expertmesh.kernels.spec import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from expertmesh.engine.stand_ins import Forward

_DTYPES = frozenset(getattr(torch, name) for name in DTYPES)
_MISROUNDED = 0.01
"""Of narrow numbers, at most so many round another way as their sum of squares was taken in another order. A norm that
rounds once instead of twice differs in many more."""


def replace_norms(model: torch.nn.Module) -> Callable[[], None]:
    """Have the model's plain norms on CPU run in machine code. Returns the way back."""
    return stand_in(model, _norm_forward) if has_llvm() else lambda: None


def _norm_forward(module: torch.nn.Module) -> Forward | None:
    """For a norm that can be computed by `cpu_norm`."""
    from expertmesh.kernels.cpu_norm import rms_norm

    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, torch.Tensor)
        and isinstance(epsilon, float)
        and weight.dim() == 1
        and weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and weight.is_contiguous()
    ):
        return None
    weight_H, own = weight.detach(), module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        """x [..., H]"""
        return rms_norm(x, weight_H, epsilon) if x.dtype == weight_H.dtype else own(x)

    return forward if _agree(own, forward, weight_H) else None


@torch.no_grad()
def _agree(own: Forward, ours: Forward, weight_H: torch.Tensor) -> bool:
    """Whether both say the same of rows of many sizes."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, len(weight_H), generator=generator) * torch.logspace(-3, 3, 16)[:, None]
    x = rows.to(weight_H.dtype)
    expected, found = own(x), ours(x)
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    misrounded = (expected != found).float().mean().item() if x.dtype.itemsize < 4 else 0.0
    tolerance = 4 * torch.finfo(x.dtype).eps
    return misrounded < _MISROUNDED and torch.allclose(found, expected, rtol=tolerance, atol=0.0)
