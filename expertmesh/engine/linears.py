"""The dense model's linear layers and gates on CPU cores, in the arithmetic that hosts use for experts.

Owns what stands in for the layers' forward. Does not know the model around them. Invariant: a row's bits depend on
nothing but the row and the layer, so that what a request gets from them is the same in any company. torch promises that
for no product, and its bfloat16 is slow where the processor has no instructions for it.

Shapes: R rows, K columns, N results of a row.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from expertmesh.engine.stand_ins import stand_in
from expertmesh.kernels.cpu import choose_arithmetic
from expertmesh.kernels.spec import DTYPES, Activation, ExpertSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from expertmesh.kernels.cpu import Arithmetic, Matrix

_PROBED = 2048
"""The largest size at which an arithmetic is tried, as that takes time with the square of it."""
_DTYPES = {getattr(torch, name): name for name in DTYPES}


def pack_linears(model: torch.nn.Module) -> Callable[[], None]:
    """Have the model's plain linear layers on CPU compute from packed copies of their weights. Returns the way back.

    The copies are made now; later changes of the weights do not reach them. The weights stay, for what else reads them.
    """
    return stand_in(model, lambda module: _packed(module.weight, module.bias) if _is_plain(module) else None)


def _is_plain(module: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether it is a product with a matrix and nothing else: no subclass's."""
    return (
        type(module) is torch.nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype in _DTYPES
        and len(module.weight) > 0  # what is left of an expert that was taken out
    )


def pack_gates(model: torch.nn.Module) -> Callable[[], None]:
    """The same for what the gates of MoE layers multiply with. Returns the way back.

    Their modules are no linear layers: each multiplies with its weight in the midst of its forward, often in float32.
    """
    return stand_in(model, _gate_forward)


def _gate_forward(module: torch.nn.Module) -> Callable[..., Any] | None:
    if not type(module).__name__.endswith(("Router", "Gate")):
        return None
    weights = [weight for weight in module.parameters() if weight.dim() == 2]
    if len(weights) != 1 or weights[0].device.type != "cpu":
        return None
    products, own = _Products(weights[0].shape), module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with products:
            return own(*args, **kwargs)

    return forward


class _Products(TorchFunctionMode):
    """While it is in force, `F.linear` with a weight of one shape, which only one has, computes from a packed copy."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = shape
        self._packed: dict[torch.dtype, Callable[[torch.Tensor], torch.Tensor]] = {}
        """By the dtype in which the module multiplies."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not kwargs:
            x, weight, bias = (*args, None)[:3]
            if weight.shape == self._shape and x.dtype == weight.dtype and x.dtype in _DTYPES:
                if x.dtype not in self._packed:
                    self._packed[x.dtype] = _packed(weight, bias)
                return self._packed[x.dtype](x)
        return function(*args, **(kwargs or {}))


def _packed(weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """x [..., K] -> y [..., N], of the weight's dtype."""
    num_results, num_columns = weight_NK.shape
    arithmetic = _arithmetic(num_columns, num_results, _DTYPES[weight_NK.dtype])
    bias = None if bias_N is None else bias_N.detach().to(arithmetic.dtype)
    matrix = arithmetic.pack(weight_NK.detach().to(arithmetic.dtype), bias)
    return functools.partial(_linear, arithmetic, matrix, num_results)


def _arithmetic(num_columns: int, num_results: int, dtype: str) -> Arithmetic:
    """The one that hosts would use here for experts of this shape."""
    spec = ExpertSpec(
        hidden=min(num_columns, _PROBED),
        intermediate=min(num_results, _PROBED),
        gated=False,
        activation=Activation(name="relu"),
        dtype=dtype,
    )
    return choose_arithmetic(spec, torch.get_num_threads())[0]


def _linear(arithmetic: Arithmetic, matrix: Matrix, num_results: int, x: torch.Tensor) -> torch.Tensor:
    """x [..., K] -> y [..., N] in x's dtype."""
    x_RK = x.reshape(-1, x.shape[-1]).to(arithmetic.dtype)
    num_rows = len(x_RK)
    if missing := -num_rows % arithmetic.row_multiple:
        x_RK = F.pad(x_RK, (0, 0, 0, missing))
    most = arithmetic.max_rows
    sizes = [min(most, len(x_RK) - first) for first in range(0, len(x_RK), most)] or [0]
    y_RN = arithmetic.product(x_RK, sizes, [matrix] * len(sizes))
    return y_RN[:num_rows, :num_results].to(x.dtype).contiguous().view(*x.shape[:-1], num_results)
