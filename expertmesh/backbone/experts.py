"""What stands where a layer's experts stood: a forward that leads to a callable.

It is entered by transformers' experts interface; where a family has none, in place of the module's own forward.

Knows nothing of where the experts are. Invariant: an experts module that was emptied holds no parameters of its own.

Shapes: T tokens, K experts per token, H hidden, P (token, expert) pairs.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expertmesh.families import family_of
from expertmesh.families.family import MoeLayerFn, rows_alone
from expertmesh.moe.layer import combine

if TYPE_CHECKING:
    from expertmesh.families import Family, Layout

__all__ = ["IMPLEMENTATION", "MoeLayerFn", "empty_experts"]

IMPLEMENTATION = "expertmesh"
"""Our name among transformers' experts implementations."""


def mesh_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts function: called with the experts module, as its forward."""
    layer: MoeLayerFn = module.mesh_layer
    if module.mesh_gate is not None:
        top_k_index, top_k_weights = module.mesh_gate(top_k_index, top_k_weights)
    if not module.has_post_expert_norm:
        overlap, begin = module.mesh_overlap, getattr(layer, "begin", None)
        if overlap is None or begin is None:
            return layer(hidden_states, top_k_index, top_k_weights)
        routed: torch.Tensor = overlap.routed(lambda: begin(hidden_states, top_k_index, top_k_weights))
        return routed
    # The norm, which stays here, comes between an expert and its weight. So the weighted sum is made here.
    x_TKH = hidden_states.unsqueeze(1).expand(-1, top_k_index.shape[1], -1)
    return combine(module.post_expert_norm(rows_alone(layer, x_TKH, top_k_index)), top_k_weights)


def not_connected(x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """A layer before `Backbone.connect`."""
    raise RuntimeError("this model's experts are elsewhere and not connected: call Backbone.connect(layers) first")


def empty_experts(module: Any, family: Family) -> Layout:
    """Take the experts' parameters out of a module (all that is no expert stays), and let its forward call a layer.

    A tensor of no experts stays in each one's place, as a plain attribute: some models' initialisation reaches for it.
    """
    layout = family.layout(module)
    for name in layout.parameter_names:
        parent, _, own_name = name.rpartition(".")
        owner, parameter = module.get_submodule(parent), module.get_parameter(name)
        delattr(owner, own_name)
        setattr(owner, own_name, torch.empty((0, *parameter.shape[1:]), dtype=parameter.dtype, device="cpu"))
    module.mesh_layer = not_connected
    module.mesh_gate = None  # see gating.py
    module.mesh_overlap = None  # see overlap.py
    if family.forward is not None:
        module.forward = types.MethodType(_forward, module)
    return layout


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module that is outside of transformers' interface."""
    family = family_of(module)
    assert family is not None
    assert family.forward is not None
    return family.forward(module, module.mesh_layer, *args, **kwargs)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, mesh_experts)
