"""Runs the experts of an indexed checkpoint somewhere, as the callables that a backbone connects to.

The one here reads them into this process and computes in plain float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from expertmesh.backbone import MoeLayerFn
from expertmesh.checkpoint.read import ExpertReader
from expertmesh.checkpoint.recipe import CheckpointIndex
from expertmesh.ids import ExpertId
from expertmesh.kernels.activation import activate
from expertmesh.kernels.spec import ExpertSpec, ExpertWeights


class LocalExecutor:
    """Every expert in this process. Shapes: T tokens, K experts per token, H hidden."""

    @contextmanager
    def run(self, index: CheckpointIndex) -> Iterator[list[MoeLayerFn]]:
        """The layers' callables, usable until the context ends."""
        with ExpertReader(Path(index.root)) as reader:
            yield [
                _layer(
                    spec,
                    [reader.read(index.recipes[ExpertId(layer, e)], spec) for e in range(index.num_experts[layer])],
                )
                for layer, spec in enumerate(index.specs)
            ]


def _layer(spec: ExpertSpec, experts: list[ExpertWeights]) -> MoeLayerFn:
    def run(x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        for token in range(x_TH.shape[0]):
            for k in range(index_TK.shape[1]):
                row_H = _evaluate(spec, experts[int(index_TK[token, k])], x_TH[token])
                y_TH[token] += row_H * weights_TK[token, k].float()
        return y_TH.to(x_TH.dtype)

    return run


def _evaluate(spec: ExpertSpec, expert: ExpertWeights, x_H: torch.Tensor) -> torch.Tensor:
    h_N = expert.w_in.float() @ x_H.float()
    if expert.b_in is not None:
        h_N = h_N + expert.b_in.float()
    y_H = expert.w_out.float() @ activate(h_N[None], spec.activation, gated=spec.gated)[0]
    return y_H if expert.b_out is None else y_H + expert.b_out.float()
