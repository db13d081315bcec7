"""What stands where a layer's experts stood: transformers' experts interface, leading to a callable.

Knows nothing of where the experts are. Invariant: an experts module that was emptied holds no parameters of its own.

Shapes: T tokens, K experts per token, H hidden, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expertmesh.moe.layer import combine

IMPLEMENTATION = "expertmesh"
"""Our name among transformers' experts implementations."""

MoeLayerFn: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x_TH, expert index_TK, gate weights_TK) -> y_TH, the weighted sum over K in the gate's order, in x's dtype.

One that has a method `begin` of the same arguments, which returns a function that waits for y_TH, is called in these
two steps where a block has shared experts to compute meanwhile."""


def mesh_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts function: called with the experts module, as its forward."""
    layer: MoeLayerFn = module.mesh_layer
    if not module.has_post_expert_norm:
        overlap, begin = module.mesh_overlap, getattr(layer, "begin", None)
        if overlap is None or begin is None:
            return layer(hidden_states, top_k_index, top_k_weights)
        routed: torch.Tensor = overlap.routed(lambda: begin(hidden_states, top_k_index, top_k_weights))
        return routed
    # The norm, which stays here, comes between an expert and its weight. So each (token, expert) pair is asked for as
    # a token of its own with weight 1, and the weighted sum is made here.
    alone_P1 = top_k_index.reshape(-1, 1)
    ones_P1 = torch.ones_like(alone_P1, dtype=torch.float32)
    rows_PH = layer(hidden_states.repeat_interleave(top_k_index.shape[1], dim=0), alone_P1, ones_P1)
    return combine(module.post_expert_norm(rows_PH).unflatten(0, top_k_index.shape), top_k_weights)


def not_connected(x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """A layer before `Backbone.connect`."""
    raise RuntimeError("this model's experts are elsewhere and not connected: call Backbone.connect(layers) first")


def empty_experts(module: Any) -> list[str]:
    """Take an experts module's own parameters out (those of a norm inside it stay) and return their names.

    A tensor of no experts stays in each one's place, as a plain attribute: some models' initialisation reaches for it.
    """
    parameters = dict(module.named_parameters(recurse=False))
    for name, parameter in parameters.items():
        delattr(module, name)
        setattr(module, name, torch.empty((0, *parameter.shape[1:]), dtype=parameter.dtype, device="cpu"))
    module.mesh_layer = not_connected
    module.mesh_overlap = None
    return list(parameters)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, mesh_experts)
