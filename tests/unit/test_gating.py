"""Another gate in the place of a checkpoint's, against transformers with the same gate as its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertmesh.backbone import Backbone, Gates, attach_model
from expertmesh.errors import ConfigError
from expertmesh.gates.spec import GateSpec
from tests.architectures.checkpoints import Architecture, build_model

IDS_RL = torch.tensor([[17, 99, 5, 64, 8], [3, 110, 42, 8, 77], [50, 51, 52, 53, 54]])
LENGTH = IDS_RL.shape[1]

OWN = {
    "qwen3_moe": {"strategy": "softmax-topk", "normalize": False},
    "mixtral": {"strategy": "softmax-topk", "normalize": True},
    "granitemoe": {"strategy": "topk-softmax"},
    "deepseek_v3": {"strategy": "sigmoid-topk", "normalize": True, "scale": 2.5},
    "lfm2_moe": {"strategy": "sigmoid-topk", "normalize": True},
}
"""What these models' gates do, but for k."""


def build(model_type: str, **overrides: Any) -> Any:
    model = build_model(Architecture(experts_class="", model_type=model_type, auto_class=None), **overrides)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) / 3)
    return model


def backbone_of(model_type: str, **overrides: Any) -> Backbone:
    """The model, with a twin's experts in the place of its own."""
    backbone = attach_model(build(model_type, **overrides))
    names = [name for module in backbone.moe_modules for name, of in backbone.model.named_modules() if of is module]
    twin = build(model_type, **overrides)
    backbone.connect([experts_of(twin.get_submodule(name)) for name in names])
    return backbone


def experts_of(module: Any) -> Any:
    def layer(x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return module(x_TH, index_TK.clamp(min=0), weights_TK)  # a weight of 0 for what leads nowhere

    return layer


def logits(model: Any, ids_RL: torch.Tensor = IDS_RL) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids_RL, use_cache=False).logits


@pytest.mark.parametrize("model_type", OWN)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_gate_does_what_the_same_gate_of_a_checkpoint_does(model_type: str, k: int):
    backbone = backbone_of(model_type)
    as_it_is = logits(backbone.model)
    Gates(backbone, GateSpec(k=k, **OWN[model_type]))
    changed = logits(backbone.model)
    torch.testing.assert_close(changed, logits(build(model_type, num_experts_per_tok=k)), atol=2e-5, rtol=0)
    assert torch.allclose(changed, as_it_is, atol=2e-5, rtol=0) == (k == 2), "2 is what the checkpoint has"


def test_without_another_gate_nothing_listens_and_nothing_changes():
    backbone = backbone_of("qwen3_moe")
    as_it_is = logits(backbone.model)
    gates = Gates(backbone)
    with gates.by_row([(None, 2 * LENGTH), (None, LENGTH)]):
        assert not any(module._forward_hooks for module in backbone.model.modules())
        assert torch.equal(logits(backbone.model), as_it_is)


@pytest.mark.parametrize("default", [None, GateSpec(strategy="dense")])
def test_each_row_has_its_own_gate_and_then_the_default_again(default: GateSpec | None):
    backbone = backbone_of("qwen3_moe")
    gates = Gates(backbone, default)
    usual = logits(backbone.model)
    top_1, top_p = GateSpec(strategy="softmax-topk", k=1), GateSpec(strategy="top-p", top_p=0.6)
    with gates.by_row([(top_1, LENGTH), (None, LENGTH), (top_p, LENGTH)]):
        mixed = logits(backbone.model)
    assert torch.equal(logits(backbone.model), usual)
    for row, gate in enumerate((top_1, None, top_p)):
        one = IDS_RL[row : row + 1]
        with gates.by_row([(gate, LENGTH)]):
            torch.testing.assert_close(mixed[row : row + 1], logits(backbone.model, one), atol=2e-5, rtol=0)
        differs = not torch.allclose(mixed[row], usual[row], atol=2e-5, rtol=0)
        assert differs == (gate is not None)


@pytest.mark.parametrize(
    ("model_type", "spec", "message"),
    [
        ("qwen3_moe", {"strategy": "softmax-topk", "k": 7}, r"gate\.k is 7, but the layer has 6 experts: use at most"),
        ("qwen3_moe", {"strategy": "sigmoid-topk", "k": 2, "num_groups": 4}, r"num_groups 4 does not divide the layer"),
        ("qwen3_moe", {"strategy": "noisy-topk", "k": 2}, r"noisy-topk needs noise_TE, which this layer does not have"),
        ("deepseek_v3", {"strategy": "top-p", "top_p": 0.5}, r"top-p takes no selection bias, which this layer has"),
        (
            "zaya",
            {"strategy": "softmax-topk", "k": 1},
            r"says 7 numbers of a token for 6 experts; leave gate out",
        ),
        (
            "gemma4",
            {"strategy": "dense"},
            r"gate\.strategy cannot be dense: the gate of MoE layer 0 says probabilities",
        ),
    ],
)
def test_a_gate_that_does_not_fit_the_model(model_type: str, spec: dict[str, Any], message: str):
    backbone = attach_model(build(model_type))
    with pytest.raises(ConfigError, match=message):
        Gates(backbone, GateSpec(**spec))
    with pytest.raises(ConfigError, match=message):
        Gates(backbone).check(GateSpec(**spec))
