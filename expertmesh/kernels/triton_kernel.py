# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""The expert FFN on a GPU: two Triton kernels over blocks of pairs, for any number of experts at once.

Owns the slabs: one tensor of all slots' weights per matrix, so that a block finds its expert by a slot number and a
launch mixes rows of different layers and requests. Its invariant: a pair's bits depend on nothing but its row and its
expert, because every pair goes through the same tile: the tile's shape and the order of K never depend on how many
rows there are, no product is split over K, and nothing is added atomically.

Rounding: products and activation accumulate in float32; a and y are rounded to the spec's dtype.

Shapes: S slots, T token rows, P pairs, B blocks, H hidden, I intermediate, N = 2I with a gate, I without.
Inside kernels: M, N, K are the sides of a tile.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from expertmesh.errors import ConfigError
from expertmesh.kernels.blocks import cut

if TYPE_CHECKING:
    from torch import Tensor

    from expertmesh.kernels.spec import ExpertSpec, ExpertWeights

BLOCK_M = 16
"""Pairs in a block, always: the least that a tensor core takes, as decoding gives an expert few rows."""


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, GATED: tl.constexpr):
    """As `activation.activate`, whose table of formulas is the one to read. `up` is ignored without a gate."""
    if ACTIVATION == "swiglu_clamped":
        gate = tl.minimum(gate, LIMIT)
        a = gate * tl.sigmoid(gate) * tl.clamp(up, -LIMIT, LIMIT)
    elif ACTIVATION == "swiglu_bounded":
        a = tl.minimum(gate * tl.sigmoid(gate), LIMIT) * tl.clamp(up, -LIMIT, LIMIT)
    elif ACTIVATION == "swiglu_oai":
        gate = tl.minimum(gate, LIMIT)
        a = gate * tl.sigmoid(gate * ALPHA) * (tl.clamp(up, -LIMIT, LIMIT) + 1.0)
    elif ACTIVATION == "swiglu_softcapped":
        a = _tanh(gate / ALPHA) * ALPHA * tl.sigmoid(gate) * (_tanh(up / LIMIT) * LIMIT)
    else:
        a = _pointwise(gate, ACTIVATION)
        if GATED:
            a *= up
    return a


@triton.jit
def _pointwise(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        a = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        a = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        a = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "quick_gelu":
        a = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "relu":
        a = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu2":
        a = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif ACTIVATION == "sigmoid":
        a = tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        a = _tanh(x)
    else:
        tl.static_assert(ACTIVATION == "linear", "unknown activation")
        a = x
    return a


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def in_kernel(
    x_ptr,  # [T, H]
    row_ptr,  # [P] int32
    block_ptr,  # [B, 3] int32: slot, first pair, stop
    w_ptr,  # [S, N, H]
    b_ptr,  # [S, N], read if BIASED
    a_ptr,  # [P, I]
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a = activation(x @ w_in.T + b_in) for one block of pairs and BLOCK_N columns of a."""
    rows_in: tl.constexpr = I * 2 if GATED else I
    block = block_ptr + tl.program_id(0) * 3
    slot = tl.load(block).to(tl.int64)
    pair_M = tl.load(block + 1) + tl.arange(0, BLOCK_M)
    in_M = pair_M < tl.load(block + 2)
    row_M = tl.load(row_ptr + pair_M, mask=in_M, other=0).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_N = n_N < I
    k_K = tl.arange(0, BLOCK_K)

    x_MK = x_ptr + row_M[:, None] * H + k_K[None, :]
    w_KN = w_ptr + slot * (rows_in * H) + n_N[None, :] * H + k_K[:, None]
    gate_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        in_K = k_K < H - k
        x = tl.load(x_MK + k, mask=in_M[:, None] & in_K[None, :], other=0.0)
        w = tl.load(w_KN + k, mask=in_K[:, None] & in_N[None, :], other=0.0)
        gate_MN = tl.dot(x, w, gate_MN, input_precision=PRECISION)
        if GATED:
            w = tl.load(w_KN + I * H + k, mask=in_K[:, None] & in_N[None, :], other=0.0)
            up_MN = tl.dot(x, w, up_MN, input_precision=PRECISION)
    if BIASED:
        b_N = b_ptr + slot * rows_in + n_N
        gate_MN += tl.load(b_N, mask=in_N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up_MN += tl.load(b_N + I, mask=in_N, other=0.0).to(tl.float32)[None, :]
    a_MN = _activate(gate_MN, up_MN, ACTIVATION, LIMIT, ALPHA, GATED)
    a = a_ptr + pair_M[:, None].to(tl.int64) * I + n_N[None, :]
    tl.store(a, a_MN.to(a_ptr.dtype.element_ty), mask=in_M[:, None] & in_N[None, :])


@triton.jit
def out_kernel(
    a_ptr,  # [P, I]
    block_ptr,  # [B, 3] int32: slot, first pair, stop
    w_ptr,  # [S, H, I]
    b_ptr,  # [S, H], read if BIASED
    y_ptr,  # [P, H]
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = a @ w_out.T + b_out for one block of pairs and BLOCK_N columns of y."""
    block = block_ptr + tl.program_id(0) * 3
    slot = tl.load(block).to(tl.int64)
    pair_M = tl.load(block + 1) + tl.arange(0, BLOCK_M)
    in_M = pair_M < tl.load(block + 2)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_N = n_N < H
    k_K = tl.arange(0, BLOCK_K)

    a_MK = a_ptr + pair_M[:, None].to(tl.int64) * I + k_K[None, :]
    w_KN = w_ptr + slot * (H * I) + n_N[None, :] * I + k_K[:, None]
    y_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, I, BLOCK_K):
        in_K = k_K < I - k
        a = tl.load(a_MK + k, mask=in_M[:, None] & in_K[None, :], other=0.0)
        w = tl.load(w_KN + k, mask=in_K[:, None] & in_N[None, :], other=0.0)
        y_MN = tl.dot(a, w, y_MN, input_precision=PRECISION)
    if BIASED:
        y_MN += tl.load(b_ptr + slot * H + n_N, mask=in_N, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + pair_M[:, None].to(tl.int64) * H + n_N[None, :]
    tl.store(y, y_MN.to(y_ptr.dtype.element_ty), mask=in_M[:, None] & in_N[None, :])


def constants(spec: ExpertSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time arguments of `in_kernel` and of `out_kernel`: functions of the spec alone, so that each kernel
    is compiled once per spec and never again, whatever the number of rows."""
    shared = {
        "H": spec.hidden,
        "I": spec.intermediate,
        "BIASED": spec.bias,
        "PRECISION": "ieee",  # TensorFloat-32 would keep 10 bits of a float32 model's 23
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": 64,
        "BLOCK_K": 32 if spec.dtype == "float32" else 64,
    }
    activation = {
        "GATED": spec.gated,
        "ACTIVATION": spec.activation.name,
        "LIMIT": spec.activation.limit,
        "ALPHA": spec.activation.alpha,
    }
    return shared | activation, shared


OPTIONS = {"num_warps": 4, "num_stages": 3}


class TritonKernel:
    """`ExpertKernel` on one GPU; or on "cpu" in Triton's interpreter (TRITON_INTERPRET=1), to test without one."""

    def __init__(self, spec: ExpertSpec, num_slots: int, device: str = "cuda") -> None:
        if device != "cpu" and not torch.cuda.is_available():
            raise ConfigError(f"device {device!r} cannot be used: torch finds no GPU here; use device 'cpu'")
        assert device != "cpu" or spec.dtype != "bfloat16", "Triton's interpreter multiplies bfloat16 as integers"
        self.spec = spec
        self.num_slots = num_slots
        self.device = torch.device(device)
        dtype = getattr(torch, spec.dtype)
        self._slabs = {
            name: torch.empty(num_slots, *shape, dtype=dtype, device=self.device) for name, shape in spec.shapes.items()
        }

    def write(self, slot: int, weights: ExpertWeights) -> None:
        weights.check(self.spec)
        for name, slab in self._slabs.items():
            slab[slot].copy_(getattr(weights, name))

    def clear(self, slot: int) -> None:
        """Nothing to do: a slab's memory is held for its slots."""

    @torch.no_grad()
    def run(self, x_TH: Tensor, row_P: Tensor, slot_P: Tensor) -> Tensor:
        if len(row_P) == 0:
            return x_TH.new_empty(0, self.spec.hidden)
        blocks = cut(slot_P.numpy(), BLOCK_M)
        in_constants, out_constants = constants(self.spec)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            x = self._to_device(x_TH)
            row = self._to_device(row_P.to(torch.int32))
            block = self._to_device(torch.tensor(blocks, dtype=torch.int32))
            a_PI = x.new_empty(len(row_P), self.spec.intermediate)
            y_PH = x.new_empty(len(row_P), self.spec.hidden)
            slabs = self._slabs
            in_kernel[len(blocks), triton.cdiv(self.spec.intermediate, in_constants["BLOCK_N"])](
                x, row, block, slabs["w_in"], slabs.get("b_in"), a_PI, **in_constants, **OPTIONS
            )
            out_kernel[len(blocks), triton.cdiv(self.spec.hidden, out_constants["BLOCK_N"])](
                a_PI, block, slabs["w_out"], slabs.get("b_out"), y_PH, **out_constants, **OPTIONS
            )
            return y_PH.cpu()

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)
