"""The families outside of transformers' experts interface, each by the name of its experts module's class.

A family is a layout (which parameters are the experts), what was chosen, and a forward that does with a layer's
callable what the module's own forward does with its experts. What is no expert stays: gates, shared experts, biases.
Nothing here keeps state.

Shapes: T tokens, K experts per token, E experts, H hidden, P = T * K (token, expert) pairs.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.errors import CheckpointError
from expertmesh.families.decorated import choose_as_told
from expertmesh.families.family import Family, Layout, Parameter, rows_alone
from expertmesh.gates.choices import NO_EXPERT, Choices

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from expertmesh.families.family import MoeLayerFn


def _gated_by(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def activate(h_RN: torch.Tensor) -> torch.Tensor:
        gate_RI, up_RI = h_RN.chunk(2, dim=-1)
        return function(gate_RI) * up_RI

    return activate


def _add_up(parts_TKN: torch.Tensor) -> torch.Tensor:
    """The sum over K, one after the other, in float32: a reduction may take another order in another batch."""
    return functools.reduce(torch.add, parts_TKN.float().unbind(dim=1))


# --- called as the experts interface is, but without it ---------------------------------------------------------------


def _stacked_layout(module: Any) -> Layout:
    _, hidden, intermediate = module.down_proj.shape
    return Layout(
        num_experts=module.num_experts,
        hidden=hidden,
        intermediate=intermediate,
        w_in=(Parameter(name="gate_up_proj"),),
        w_out=Parameter(name="down_proj"),
        activate=module._apply_gate,
    )


def _forward_as_told(
    _module: Any, layer: MoeLayerFn, x: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    return layer(x.flatten(0, -2), index_TK, weights_TK).view(x.shape)


# --- DBRX: all experts below one another in w1 (gate), v1 (up) and w2 ([I, H] each) -----------------------------------


def _dbrx_layout(module: Any) -> Layout:
    return Layout(
        num_experts=module.num_experts,
        hidden=module.hidden_size,
        intermediate=module.ffn_hidden_size,
        w_in=(Parameter(name="mlp.w1", kept="flat"), Parameter(name="mlp.v1", kept="flat")),
        w_out=Parameter(name="mlp.w2", kept="flat", transposed=True),
        activate=_gated_by(module.mlp.activation_fn),
    )


# --- LongCat-Flash: the experts past the last are "zero experts", whose output is their input -------------------------


def _longcat_layout(module: Any) -> Layout:
    return Layout(
        num_experts=module.num_routed_experts,
        hidden=module.hidden_size,
        intermediate=module.intermediate_size,
        w_in=(Parameter(name="gate_up_proj", num_spare=module.zero_expert_num),),
        w_out=Parameter(name="down_proj"),
        activate=_gated_by(module.act_fn),
    )


def _longcat_choose(module: Any, _x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> Choices:
    is_zero_TK = index_TK >= module.num_routed_experts
    return Choices(
        index_TK=index_TK.masked_fill(is_zero_TK, NO_EXPERT), weights_TK=weights_TK.masked_fill(is_zero_TK, 0.0)
    )


def _longcat_forward(
    module: Any, layer: MoeLayerFn, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    chosen = _longcat_choose(module, x_TH, index_TK, weights_TK)
    zero_weights_T1 = _add_up(weights_TK.masked_fill(chosen.index_TK != NO_EXPERT, 0.0).unsqueeze(-1))
    unchanged_TH = (x_TH.float() * zero_weights_T1).to(x_TH.dtype)
    return layer(x_TH, chosen.index_TK, chosen.weights_TK) + unchanged_TH


# --- Llama 4: the gate's score multiplies what goes into an expert, and what comes out is summed as it is -------------


def _llama4_layout(module: Any) -> Layout:
    experts = module.experts
    return Layout(
        num_experts=experts.num_experts,
        hidden=experts.hidden_size,
        intermediate=experts.expert_dim,
        w_in=(Parameter(name="experts.gate_up_proj", transposed=True),),
        w_out=Parameter(name="experts.down_proj", transposed=True),
        activate=_gated_by(experts.act_fn),
    )


def _llama4_choose(module: Any, hidden_states: torch.Tensor) -> Choices:
    scores_TE, logits_TE = module.router(hidden_states.flatten(0, -2))
    index_TK = logits_TE.topk(module.top_k, dim=1).indices
    return Choices(index_TK=index_TK, weights_TK=scores_TE.gather(1, index_TK))


def _llama4_forward(
    module: Any, layer: MoeLayerFn, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    x_TH = hidden_states.flatten(0, -2)
    chosen = _llama4_choose(module, x_TH)
    scaled_TKH = x_TH.unsqueeze(1) * chosen.weights_TK.unsqueeze(-1)
    routed_TH = _add_up(rows_alone(layer, scaled_TKH, chosen.index_TK)).to(x_TH.dtype)
    return module.shared_expert(x_TH) + routed_TH, None  # the gate's logits, which no caller reads


# --- JetMoE: the experts of its feed-forward layers. Those of its attention are single matrices and stay -------------


def _jetmoe_layout(module: Any) -> Layout:
    return Layout(
        num_experts=module.input_linear.num_experts,
        hidden=module.input_size,
        intermediate=module.hidden_size,
        w_in=(Parameter(name="input_linear.weight"),),
        w_out=Parameter(name="output_linear.weight"),
        activate=_gated_by(module.activation),
    )


def _jetmoe_choose(module: Any, layer_input: torch.Tensor) -> Choices:
    *_, logits_TE = module.router(layer_input.flatten(0, -2))
    best = logits_TE.topk(module.router.top_k, dim=1)
    return Choices(index_TK=best.indices, weights_TK=best.values.softmax(dim=1).type_as(layer_input))


def _jetmoe_forward(module: Any, layer: MoeLayerFn, layer_input: torch.Tensor) -> torch.Tensor:
    chosen = _jetmoe_choose(module, layer_input)
    y_TH = layer(layer_input.flatten(0, -2), chosen.index_TK, chosen.weights_TK)
    return y_TH.view(layer_input.shape) + module.bias  # type: ignore[no-any-return]


# --- Switch Transformers: one expert for each token, if it has room ---------------------------------------------------


def _switch_layout(module: Any) -> Layout:
    one = module["expert_0"]
    return Layout(
        num_experts=module.num_experts,
        hidden=one.wi.in_features,
        intermediate=one.wi.out_features,
        w_in=(Parameter(name="expert_{}.wi.weight", kept="each"),),
        w_out=Parameter(name="expert_{}.wo.weight", kept="each"),
        gated=False,
        activate=one.act,
    )


def _switch_choose(_module: Any, _x_TH: torch.Tensor, is_chosen_T1E: torch.Tensor, weights_T1: torch.Tensor) -> Choices:
    has_none_T1 = ~is_chosen_T1E.any(dim=-1)
    return Choices(
        index_TK=is_chosen_T1E.argmax(dim=-1).masked_fill(has_none_T1, NO_EXPERT),
        weights_TK=weights_T1.masked_fill(has_none_T1, 0.0),
    )


def _switch_forward(module: Any, layer: MoeLayerFn, x_TH: torch.Tensor, *gate: torch.Tensor) -> torch.Tensor:
    chosen = _switch_choose(module, x_TH, *gate)
    return layer(x_TH, chosen.index_TK, chosen.weights_TK)


# --- NLLB-MoE: two experts for each token -----------------------------------------------------------------------------


def _nllb_layout(module: Any) -> Layout:
    if module.router.moe_eval_capacity_token_fraction < 1:
        raise CheckpointError(
            "config.json: moe_eval_capacity_token_fraction is below 1, so that what a token gets depends on which "
            "others are computed with it; set it to 1"
        )
    one = module.experts["expert_0"]
    return Layout(
        num_experts=module.num_experts,
        hidden=one.fc1.in_features,
        intermediate=one.fc1.out_features,
        w_in=(Parameter(name="experts.expert_{}.fc1.weight", kept="each"),),
        w_out=Parameter(name="experts.expert_{}.fc2.weight", kept="each"),
        b_in=Parameter(name="experts.expert_{}.fc1.bias", kept="each"),
        b_out=Parameter(name="experts.expert_{}.fc2.bias", kept="each"),
        gated=False,
        activate=one.act,
    )


def _nllb_choose(module: Any, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Choices:
    _, probs_TE, _ = module.router(hidden_states.flatten(0, -2), padding_mask)
    best = probs_TE.topk(2, dim=1)
    kept_share = 1 - module.experts.moe_token_dropout
    index_TK = best.indices.masked_fill(best.values == 0, NO_EXPERT)
    return Choices(index_TK=index_TK, weights_TK=best.values * kept_share)


def _nllb_forward(
    module: Any, layer: MoeLayerFn, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
) -> torch.Tensor:
    chosen = _nllb_choose(module, hidden_states, padding_mask)
    return layer(hidden_states.flatten(0, -2), chosen.index_TK, chosen.weights_TK).view(hidden_states.shape)


PLAIN: Mapping[str, Family] = {
    "DbrxExperts": Family(layout=_dbrx_layout, choose=choose_as_told, forward=_forward_as_told),
    "JetMoeMoE": Family(layout=_jetmoe_layout, choose=_jetmoe_choose, forward=_jetmoe_forward),
    "Llama4TextMoe": Family(layout=_llama4_layout, choose=_llama4_choose, forward=_llama4_forward),
    "LongcatFlashExperts": Family(layout=_longcat_layout, choose=_longcat_choose, forward=_longcat_forward),
    "NllbMoeSparseMLP": Family(layout=_nllb_layout, choose=_nllb_choose, forward=_nllb_forward),
    "Step3p7Experts": Family(layout=_stacked_layout, choose=choose_as_told, forward=_forward_as_told),
    "SwitchTransformersExperts": Family(layout=_switch_layout, choose=_switch_choose, forward=_switch_forward),
}
