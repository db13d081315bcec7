"""Every activation an expert may have, by name; and how to tell which one a model uses.

Knows nothing of weights, devices or transformers. Its invariant: **an element's result never depends on where in the
tensor the element lies.** torch's fused `silu`, `gelu` and `sigmoid` break it: they take the elements that fill a
vector register through one formula and the leftover ones through another, so the last bits change with the number of
rows. `exp`, `tanh`, `erf` and plain arithmetic keep it, and everything here is made of those.

Shapes: R rows, I intermediate, N = 2I with a gate, I without. All arithmetic is float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from expertmesh.errors import CheckpointError
from expertmesh.kernels.spec import Activation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor


def _sigmoid(x: Tensor) -> Tensor:
    return torch.exp(-x).add_(1.0).reciprocal_()


def _silu(x: Tensor) -> Tensor:
    denominator = torch.exp(-x).add_(1.0)
    return torch.div(x, denominator, out=denominator)


def _gelu(x: Tensor) -> Tensor:
    return torch.erf(x * math.sqrt(0.5)).add_(1.0).mul_(x * 0.5)


def _gelu_tanh(x: Tensor) -> Tensor:
    inner = (x * x * x).mul_(0.044715).add_(x).mul_(math.sqrt(2.0 / math.pi))
    return inner.tanh_().add_(1.0).mul_(x * 0.5)


def _quick_gelu(x: Tensor) -> Tensor:
    return _sigmoid(x * 1.702).mul_(x)


def _relu2(x: Tensor) -> Tensor:
    return torch.clamp(x, min=0.0).square_()


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": lambda x: torch.clamp(x, min=0.0),
    "relu2": _relu2,
    "sigmoid": _sigmoid,
    "tanh": torch.tanh,
    "linear": torch.clone,
}
"""Functions of one tensor, named as in transformers. Gated, they mean `f(gate) * up`. They return a fresh tensor."""


def _swiglu_clamped(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    limit = activation.limit
    return _silu(gate.clamp(max=limit)).mul_(up.clamp(-limit, limit))


def _swiglu_bounded(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    limit = activation.limit
    return _silu(gate).clamp_(max=limit).mul_(up.clamp(-limit, limit))


def _swiglu_oai(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    limit = activation.limit
    gate = gate.clamp(max=limit)
    return _sigmoid(gate * activation.alpha).mul_(gate).mul_(up.clamp(-limit, limit).add_(1.0))


def _swiglu_softcapped(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    capped_gate = (gate / activation.alpha).tanh_().mul_(activation.alpha)
    capped_up = (up / activation.limit).tanh_().mul_(activation.limit)
    return capped_gate.mul_(_sigmoid(gate)).mul_(capped_up)


GATED: dict[str, Callable[[Tensor, Tensor, Activation], Tensor]] = {
    "swiglu_clamped": _swiglu_clamped,
    "swiglu_bounded": _swiglu_bounded,
    "swiglu_oai": _swiglu_oai,
    "swiglu_softcapped": _swiglu_softcapped,
}
"""Functions of gate and up together, with the constants L = limit and A = alpha:

    swiglu_clamped      silu(min(gate, L)) * clamp(up, -L, L)                       DeepSeek-V4, GLM-5, Hunyuan-V4
    swiglu_bounded      min(silu(gate), L) * clamp(up, -L, L)                       Step-3.7
    swiglu_oai          g * sigmoid(A g) * (clamp(up, -L, L) + 1), g = min(gate, L) gpt-oss, MiniMax-M3
    swiglu_softcapped   A tanh(gate / A) * sigmoid(gate) * L tanh(up / L)           Inkling-2
"""

ACTIVATIONS = frozenset(POINTWISE) | frozenset(GATED)
"""Every name that `Activation.name` may take."""


def activate(h_RN: Tensor, activation: Activation, *, gated: bool) -> Tensor:
    """The expert's activation over float32 rows in slot layout (gate columns first, then up) -> a_RI, a new tensor."""
    if not gated:
        return POINTWISE[activation.name](h_RN)
    gate_RI, up_RI = h_RN.chunk(2, dim=-1)
    if activation.name in POINTWISE:
        return POINTWISE[activation.name](gate_RI).mul_(up_RI)
    return GATED[activation.name](gate_RI, up_RI, activation)


_COMMON = (
    Activation(name="swiglu_oai", limit=7.0, alpha=1.702),
    Activation(name="swiglu_clamped", limit=7.0),
    Activation(name="swiglu_clamped", limit=10.0),
    Activation(name="swiglu_softcapped", limit=25.0, alpha=4.0),
)


def match_activation(
    apply_gate: Callable[[Tensor], Tensor], *, gated: bool, candidates: Iterable[Activation] = ()
) -> Activation:
    """Find the activation that computes what a model's own function computes, by trying them on the same inputs.

    `apply_gate` maps float32 h_RN in slot layout to a_RI. Tried are the plain names, the simplest first; then
    `candidates`, guesses from the model's config (names that we do not have are passed over); then the families' usual
    constants.

    Raises:
        CheckpointError: nothing matches to float32 rounding, so the model would be computed wrong.
    """
    gate_RI, up_RI = _probe()
    h_RN = torch.cat([gate_RI, up_RI], dim=-1) if gated else gate_RI
    with torch.no_grad():
        theirs_RI = apply_gate(h_RN.clone()).float()
    # Rounding errors scale with the factors, not with the product, where the product is nearly zero.
    tolerance_RI = 1e-5 * theirs_RI.abs() + 1e-6 * (1 + gate_RI.abs()) * ((1 + up_RI.abs()) if gated else 1.0)
    tried = []
    for candidate in _known(gated, candidates):
        ours_RI = activate(h_RN, candidate, gated=gated)
        if bool(((ours_RI - theirs_RI).abs() <= tolerance_RI).all()):
            return candidate
        tried.append(candidate.name)
    raise CheckpointError(
        f"the experts' activation is none that expertmesh has (tried {', '.join(dict.fromkeys(tried))}): "
        "this architecture cannot be served before its activation is added to expertmesh.kernels.activation"
    )


def _known(gated: bool, candidates: Iterable[Activation]) -> Iterator[Activation]:
    names = ACTIVATIONS if gated else frozenset(POINTWISE)
    yield from (Activation(name=name) for name in POINTWISE)
    yield from (candidate for candidate in candidates if candidate.name in names)
    if gated:
        yield from _COMMON


def _probe() -> tuple[Tensor, Tensor]:
    """Gate and up at every pairing of scales: near zero, where the curves bend, and far past any clamp."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.1, 1.0, 3.0, 10.0, 30.0, 1e3, 1e6])
    gate_scale_R, up_scale_R = torch.cartesian_prod(scales, scales).unbind(dim=-1)
    shape = (len(gate_scale_R), 256)
    gate_RI = (torch.rand(shape, generator=generator) * 2 - 1) * gate_scale_R[:, None]
    up_RI = (torch.rand(shape, generator=generator) * 2 - 1) * up_scale_R[:, None]
    return gate_RI, up_RI
