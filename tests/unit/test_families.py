"""Families outside of transformers' experts interface: what is sent to experts, and what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.backbone import attach_model
from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.errors import CheckpointError
from expertmesh.gates.choices import NO_EXPERT
from tests.architectures.checkpoints import save_checkpoint

PROMPT = torch.tensor([[17, 99, 5, 64, 23, 110, 42, 8, 77, 31]])


def calls_of(model: Any, **inputs: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What the model asks of its layers, whose experts answer with zeros."""
    calls = []

    def layer(x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        calls.append((x_TH, index_TK, weights_TK))
        return torch.zeros_like(x_TH)

    backbone = attach_model(model)
    backbone.connect([layer] * len(backbone.moe_modules))
    with torch.no_grad():
        backbone.model(input_ids=PROMPT, **inputs)
    return calls


def test_the_zero_experts_of_longcat_are_asked_of_nobody(tmp_path: Path):
    calls = calls_of(save_checkpoint(tmp_path, "longcat_flash"))
    assert len(calls) == 2
    index = torch.cat([index_TK for _, index_TK, _ in calls])
    assert 0 < (index == NO_EXPERT).sum() < index.numel()
    assert index.max() < 6 == index_checkpoint(tmp_path).num_experts[0]


def test_experts_that_are_stored_for_the_zero_experts_of_longcat_need_not_be_there(tmp_path: Path):
    """transformers writes weights for them, the model's authors do not."""
    from safetensors.torch import load_file, save_file

    save_checkpoint(tmp_path, "longcat_flash")
    whole = index_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    spare = [name for name in tensors if any(f".experts.{e}." in name for e in range(6, 10))]
    assert spare
    save_file({name: tensors[name] for name in tensors.keys() - spare}, tmp_path / "model.safetensors")
    assert index_checkpoint(tmp_path) == whole


def test_each_chosen_expert_of_llama_4_gets_a_row_of_its_own_scaled_by_the_gate(tmp_path: Path):
    model = save_checkpoint(tmp_path, "llama4_text", num_experts_per_tok=3)
    x_PH, index_P1, weights_P1 = calls_of(model)[0]
    assert x_PH.shape == (30, 32)
    assert index_P1.shape == (30, 1)
    assert torch.equal(weights_P1, torch.ones(30, 1))
    # Rows of one token are multiples of one another, by other factors.
    one, other = x_PH.unflatten(0, (10, 3))[:, 0], x_PH.unflatten(0, (10, 3))[:, 1]
    ratios = one / other
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios))
    assert (ratios[:, 0] > 1).all()


def test_the_experts_of_jetmoes_attention_stay(tmp_path: Path):
    model = save_checkpoint(tmp_path, "jetmoe")
    attention = {name: t for name, t in model.named_parameters() if ".self_attention.experts." in name}
    feed_forward = [name for name, _ in model.named_parameters() if ".mlp." in name and "_linear" in name]
    assert len(attention) == 8
    assert len(feed_forward) == 4
    left = dict(attach_model(model).model.named_parameters())
    assert attention.items() <= left.items()
    assert not left.keys() & set(feed_forward)
    assert {"model.layers.0.mlp.bias", "model.layers.0.mlp.router.layer.weight"} <= left.keys()


def test_tokens_that_switch_has_no_room_for_are_asked_of_nobody(tmp_path: Path):
    model = save_checkpoint(tmp_path, "switch_transformers", expert_capacity=1)
    (_, index_T1, weights_T1), *_ = calls_of(model, decoder_input_ids=PROMPT[:, :1])
    chosen = index_T1[index_T1 != NO_EXPERT].tolist()
    assert len(index_T1) == 10
    assert 0 < len(chosen) == len(set(chosen)) < 10
    assert not weights_T1[index_T1 == NO_EXPERT].any()


def test_a_capacity_that_depends_on_the_batch_is_refused(tmp_path: Path):
    save_checkpoint(tmp_path, "nllb-moe", moe_eval_capacity_token_fraction=0.5)
    with pytest.raises(CheckpointError, match="moe_eval_capacity_token_fraction is below 1"):
        index_checkpoint(tmp_path)
