"""Proof that a replica computes its expert: known rows, their answer by a computation of another kind, and digests.

What can go wrong between a checkpoint and an answer (a file's bytes, memory, the packing for a device, the device)
shows in one of two ways: the weights read differ from what other hosts read, or the kernel computes something else than
the weights say. Knows neither slots nor who asks. Its invariant: known rows and digests are the same on every machine.

Shapes: R known rows, H hidden.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, NamedTuple

import torch

from expertmesh.errors import CheckpointError
from expertmesh.kernels.quantization import dequantize
from expertmesh.kernels.reference import compute_row
from expertmesh.kernels.selfcheck import probe_rows

if TYPE_CHECKING:
    from torch import Tensor

    from expertmesh.kernels.spec import ExpertSpec, ExpertWeights

NUM_ROWS = 2
"""As many as it takes for rows to be told apart; the reference reads all weights once for each."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 2.0**-4, "float16": 2.0**-6}
"""Of an element, as a part of the row's largest: well above what rounding does, far below what a wrong block does."""

DIGEST_BYTES = 16


class Expected(NamedTuple):
    """What is known of an expert before any kernel has it."""

    weights: bytes
    """Their digest."""
    y_RH: Tensor
    """Its answer to the known rows, in float32."""


@functools.cache
def known_rows(spec: ExpertSpec) -> Tensor:
    """x_RH in the spec's dtype, of magnitude about one. Not to be written to."""
    return probe_rows(spec, NUM_ROWS)


@torch.no_grad()
def expect(weights: ExpertWeights, spec: ExpertSpec) -> Expected:
    """What an expert with these weights should answer. Takes about as long as reading them: for a thread of its own.

    Quantized weights answer as what they stand for, so what quantizing has cost is no fault of the replica's.
    """
    hashed = hashlib.sha256()
    for tensor in weights:
        if tensor is not None:
            hashed.update(tensor.view(torch.uint8).numpy().data)
    plain = dequantize(weights, spec)
    y_RH = torch.stack([compute_row(spec, plain, x_H.float()) for x_H in known_rows(spec)])
    return Expected(hashed.digest()[:DIGEST_BYTES], y_RH)


def check(y_RH: Tensor, expected: Expected) -> None:
    """Whether a kernel's answer to the known rows is what was expected. Raises CheckpointError if not."""
    if not expected.y_RH.to(y_RH.dtype).isfinite().all():
        raise CheckpointError("its weights make ordinary rows infinite")
    if not y_RH.isfinite().all():
        raise CheckpointError("it answers known rows with a NaN or an infinity, and its weights say otherwise")
    scale_R1 = expected.y_RH.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(y_RH.dtype).tiny)
    off = float(((y_RH.float() - expected.y_RH).abs() / scale_R1).max())
    if off > TOLERANCE[str(y_RH.dtype).removeprefix("torch.")]:
        raise CheckpointError(f"its answer to known rows is off by {off:.2g} of what its weights say")


def digest_of(y_RH: Tensor) -> bytes:
    """Of a kernel's answer to the known rows."""
    return hashlib.sha256(y_RH.contiguous().view(torch.uint8).numpy().data).digest()[:DIGEST_BYTES]
