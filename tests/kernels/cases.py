"""Random experts and random pairs for the kernels' tests."""

from __future__ import annotations

import functools

import torch

from expertmesh.kernels import ExpertKernel
from expertmesh.kernels.activation import GATED, POINTWISE
from expertmesh.kernels.formats import FORMATS
from expertmesh.kernels.quantization import quantize
from expertmesh.kernels.spec import Activation, ExpertSpec, ExpertWeights

NUM_SLOTS = 4
NUM_ROWS = 24

SILU = Activation(name="silu")
GATED_ACTIVATIONS = [Activation(name=name, limit=1.5, alpha=1.25) for name in (*POINTWISE, *GATED)]
UNGATED_ACTIVATIONS = [Activation(name=name) for name in POINTWISE]

QUANTIZED = [name for name in FORMATS if name != "dense"]

TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2, "float16": 5e-3}
"""Of a kernel against the reference: a few units in the last place of values of magnitude one."""


def make_spec(
    hidden: int,
    intermediate: int,
    *,
    dtype: str = "float32",
    gated: bool = True,
    bias: bool = False,
    activation: Activation = SILU,
    weight_format: str = "dense",
) -> ExpertSpec:
    return ExpertSpec(
        hidden=hidden,
        intermediate=intermediate,
        dtype=dtype,
        gated=gated,
        bias=bias,
        activation=activation,
        weight_format=weight_format,
    )


@functools.cache
def random_expert(spec: ExpertSpec, seed: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(getattr(torch, spec.dtype))
        for name, shape in spec.shapes.items()
    }
    return quantize(ExpertWeights(**tensors), spec)


@functools.cache
def random_rows(spec: ExpertSpec, num_rows: int = NUM_ROWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(num_rows, spec.hidden, generator=generator).to(getattr(torch, spec.dtype))


def random_pairs(num_pairs: int, num_rows: int = NUM_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """row_P and slot_P, sorted by slot."""
    generator = torch.Generator().manual_seed(num_pairs)
    row_P = torch.randint(num_rows, (num_pairs,), generator=generator)
    slot_P = torch.randint(NUM_SLOTS, (num_pairs,), generator=generator).sort().values
    return row_P, slot_P


def filled(kernel: ExpertKernel) -> ExpertKernel:
    """The kernel with a random expert in every slot, the same ones for every kernel of a spec."""
    for slot in range(kernel.num_slots):
        kernel.write(slot, random_expert(kernel.spec, slot))
    return kernel
