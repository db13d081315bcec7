"""Experts in this process: the same layer without a service. Plain torch, trained as any module.

Shapes: T tokens, K experts per token, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from expertmesh.checkpoint.layer_folder import index_layers, read_config
from expertmesh.checkpoint.read import ExpertReader
from expertmesh.ids import ExpertId
from expertmesh.kernels.differentiable import expert_ffn
from expertmesh.kernels.spec import ExpertWeights

if TYPE_CHECKING:
    from pathlib import Path


class LocalExperts(nn.Module):
    """All experts of a folder (`checkpoint.layer_folder`) as parameters. See `experts.Experts`.

    An optimiser leaves an expert that no row has chosen as it is, as hosts do, if gradients are set to None in between.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when the folder is not whole."""
        super().__init__()
        config = read_config(folder)
        index = index_layers(folder)
        self.hidden = config.hidden
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.num_experts = index.num_experts
        self._spec = config.spec
        with ExpertReader(folder) as reader:
            for expert in config.experts:
                for name, tensor in reader.read(index.recipes[expert], config.spec)._asdict().items():
                    if tensor is not None:
                        self.register_parameter(_name(expert, name), nn.Parameter(tensor))

    def weights(self, expert: ExpertId) -> ExpertWeights:
        """One expert's parameters."""
        return ExpertWeights(**{name: getattr(self, _name(expert, name)) for name in self._spec.shapes})

    def rows(self, layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        rows_TKH = x_TH.new_zeros(*index_TK.shape, x_TH.shape[1])
        for index in torch.unique(index_TK).tolist():
            is_chosen_TK = index_TK == index
            x_RH = x_TH[is_chosen_TK.nonzero()[:, 0]]
            y_RH = expert_ffn(self._spec, self.weights(ExpertId(layer, index)), x_RH)
            rows_TKH = rows_TKH.index_put((is_chosen_TK,), y_RH)
        return rows_TKH


def _name(expert: ExpertId, name: str) -> str:
    return f"expert_{expert.layer}_{expert.index}_{name}"
