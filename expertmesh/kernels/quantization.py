"""From weights to codes and scales, and back: what each format of `formats.py` means, in plain torch on CPU.

Invariant: the same weights give the same bytes on every machine, as each step is one correctly rounded operation or a
maximum. A zero matrix is stored as zeros, and every scale is finite and above the smallest normal float32.

Shapes: N rows, K columns, G groups of columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from expertmesh.kernels.spec import ExpertWeights

if TYPE_CHECKING:
    from torch import Tensor

    from expertmesh.kernels.formats import WeightFormat
    from expertmesh.kernels.spec import ExpertSpec

GREATEST = {"int8": 127.0, "int4": -8.0, "fp8": 448.0}
"""The code of the weight that is largest in its group. Of int4's sixteen codes the one without a counterpart is used,
by a scale of either sign: as llama.cpp's Q4_0 does."""


def quantize(weights: ExpertWeights, spec: ExpertSpec) -> ExpertWeights:
    """Dense weights, in the spec's dtype, in its format. Takes a few passes over them; for a thread of its own."""
    weights.check(spec.dense)
    if spec.format.is_dense:
        return weights
    parts = 2 if spec.gated else 1  # gate and up are matrices of their own, whose blocks of rows begin anew
    w_in, s_in = quantize_matrix(weights.w_in, spec.format, parts)
    w_out, s_out = quantize_matrix(weights.w_out, spec.format)
    return weights._replace(w_in=w_in, w_out=w_out, s_in=s_in, s_out=s_out)


def dequantize(weights: ExpertWeights, spec: ExpertSpec) -> ExpertWeights:
    """Weights in the spec's format as float32 tensors: what they mean. Dense ones are passed on as they are."""
    if spec.format.is_dense:
        return weights
    assert weights.s_in is not None
    assert weights.s_out is not None
    return ExpertWeights(
        w_in=dequantize_matrix(weights.w_in, weights.s_in, spec.format, spec.hidden),
        w_out=dequantize_matrix(weights.w_out, weights.s_out, spec.format, spec.intermediate),
        b_in=weights.b_in,
        b_out=weights.b_out,
    )


def quantize_matrix(w_NK: Tensor, form: WeightFormat, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Codes [N, stored columns] and scales [G, N] of a weight that is `parts` matrices of equal height in one."""
    w_NGC = _in_groups(w_NK.float(), form)
    if form.scale_rows > 1:
        whole = [_by_blocks(part, form.scale_rows) for part in w_NGC.chunk(parts)]
        peak_NG = torch.cat(whole)
    elif GREATEST[form.code] > 0:
        peak_NG = w_NGC.abs().amax(-1)
    else:
        peak_NG = w_NGC.gather(-1, w_NGC.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale_NG = (peak_NG / GREATEST[form.code]).to(getattr(torch, form.scale_dtype))
    # A group of nothing but zeros, or so near that its scale would have few bits left, is stored as zeros.
    tiny = scale_NG.float().abs() < torch.finfo(torch.float32).tiny
    scale_NG = scale_NG.masked_fill(tiny, 1.0)
    q_NGC = (w_NGC / scale_NG.float()[:, :, None]).masked_fill(tiny[:, :, None], 0.0)
    return _encode(q_NGC, form, w_NK.shape[1]), scale_NG.T.contiguous()


def dequantize_matrix(codes: Tensor, s_GN: Tensor, form: WeightFormat, columns: int) -> Tensor:
    """w_NK in float32."""
    w_NGC = _in_groups(decode(codes, form), form)
    return (w_NGC * s_GN.T.float()[:, :, None]).flatten(1)[:, :columns].contiguous()


def decode(codes: Tensor, form: WeightFormat) -> Tensor:
    """The numbers that codes stand for, in float32, with the columns that fill up the last group of int4."""
    if form.code == "int8":
        return codes.float()
    if form.code == "fp8":
        return codes.view(torch.float8_e4m3fn).float()
    pairs = codes.view(len(codes), -1, form.group // 2)
    return torch.cat([pairs & 15, pairs >> 4], dim=-1).flatten(1).float() - 8


def _encode(q_NGC: Tensor, form: WeightFormat, columns: int) -> Tensor:
    greatest = abs(GREATEST[form.code])
    if form.code == "fp8":
        q_NK = q_NGC.clamp(-greatest, greatest).flatten(1)[:, :columns]
        return q_NK.to(torch.float8_e4m3fn).view(torch.uint8).contiguous()
    if form.code == "int8":
        q_NK = q_NGC.round().clamp(-greatest, greatest).flatten(1)[:, :columns]
        return q_NK.to(torch.int8).contiguous()
    biased = (q_NGC.round().clamp(-8, 7) + 8).to(torch.uint8)
    below, above = biased.chunk(2, dim=-1)
    return (below | above << 4).flatten(1).contiguous()


def _in_groups(w_NK: Tensor, form: WeightFormat) -> Tensor:
    """[N, G, columns of a group], the last group filled up with zeros."""
    columns = w_NK.shape[1]
    group = form.group or columns
    return F.pad(w_NK, (0, -columns % group)).view(len(w_NK), -1, group)


def _by_blocks(w_NGC: Tensor, scale_rows: int) -> Tensor:
    """peak_NG: the largest magnitude in each block of rows and group of columns, for each of its rows."""
    blocks = [block.abs().amax((0, 2)).expand(len(block), -1) for block in torch.split(w_NGC, scale_rows)]
    return torch.cat(blocks)
