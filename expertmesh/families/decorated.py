"""The family of all classes that have transformers' experts interface (`@use_experts_implementation`).

The decorator says of each class how its parameters lie. Knows no architecture by name.
"""

from __future__ import annotations

from typing import Any

import torch

from expertmesh.families.family import Family, Layout, Parameter
from expertmesh.gates.choices import Choices


def is_decorated(module: torch.nn.Module) -> bool:
    return hasattr(module, "_is_expert_parallel")


def _layout(module: Any) -> Layout:
    rows, columns = module.down_proj.shape[1:]
    hidden, intermediate = (columns, rows) if module.is_transposed else (rows, columns)
    into = "gate_up_proj" if module.has_gate else "up_proj"
    turned, mixed = module.is_transposed, module.has_gate and not module.is_concatenated

    def activate(h_RN: torch.Tensor) -> torch.Tensor:
        if not module.has_gate:
            return module.act_fn(h_RN)  # type: ignore[no-any-return]
        if mixed:
            h_RN = torch.stack(h_RN.chunk(2, dim=-1), dim=-1).flatten(-2)
        return module._apply_gate(h_RN)  # type: ignore[no-any-return]

    return Layout(
        num_experts=module.num_experts,
        hidden=hidden,
        intermediate=intermediate,
        w_in=(Parameter(name=into, transposed=turned, interleaved=mixed),),
        w_out=Parameter(name="down_proj", transposed=turned),
        b_in=Parameter(name=f"{into}_bias", interleaved=mixed) if module.has_bias else None,
        b_out=Parameter(name="down_proj_bias") if module.has_bias else None,
        gated=module.has_gate,
        activate=activate,
    )


def choose_as_told(_module: Any, _x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> Choices:
    """Of a module that is called with what was chosen."""
    return Choices(index_TK=index_TK, weights_TK=weights_TK)


DECORATED = Family(layout=_layout, choose=choose_as_told)
