"""A model without its experts: what it holds, and what it refuses."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from expertmesh.backbone import attach_model, count_expert_parameters, load_backbone
from expertmesh.errors import CheckpointError
from tests.architectures.checkpoints import save_checkpoint

PROMPT = torch.tensor([[17, 99, 5, 64]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


def echo(x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    return x_TH


def test_a_backbone_holds_every_parameter_but_the_experts(tmp_path: Path):
    model = save_checkpoint(tmp_path, "olmoe")
    backbone = load_backbone(tmp_path).model
    assert count_expert_parameters(backbone) == 0
    parameters = dict(backbone.named_parameters())
    expected = {name: tensor for name, tensor in model.named_parameters() if ".experts." not in name}
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], tensor) for name, tensor in expected.items())
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in parameters.values())
    assert not backbone.training


def test_a_norm_after_the_experts_stays(tmp_path: Path):
    model = save_checkpoint(tmp_path, "muse_spark")
    (module,) = load_backbone(tmp_path).moe_modules
    (name,) = [name for name, _ in model.named_parameters() if "post_expert_norm" in name]
    assert torch.equal(module.post_expert_norm.weight, model.get_parameter(name))


def test_loading_leaves_transformers_as_it_was(tmp_path: Path):
    model = save_checkpoint(tmp_path, "mixtral")
    backbone = load_backbone(tmp_path)
    assert type(backbone.model) is transformers.MixtralForCausalLM
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert count_expert_parameters(again) == count_expert_parameters(model) > 0
    torch.testing.assert_close(logits(again), logits(model))


def test_backbones_loaded_at_the_same_time_get_their_own_dtypes(tmp_path: Path):
    save_checkpoint(tmp_path, "mixtral")
    models: dict[str, Any] = {}
    dtypes = ["float32", "bfloat16", "float16", "float32", "bfloat16"]
    threads = [
        threading.Thread(target=lambda n=n, dtype=dtype: models.update({n: load_backbone(tmp_path, dtype=dtype).model}))
        for n, dtype in enumerate(dtypes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded = [{str(tensor.dtype) for tensor in models[n].parameters()} for n in range(len(dtypes))]
    assert loaded == [{f"torch.{dtype}"} for dtype in dtypes]


def test_the_attention_implementation_can_be_chosen(tmp_path: Path):
    save_checkpoint(tmp_path, "mixtral")
    backbone = load_backbone(tmp_path, attn_implementation="eager")
    assert backbone.model.config._attn_implementation == "eager"


def test_a_backbone_that_is_not_connected_says_so(tmp_path: Path):
    save_checkpoint(tmp_path, "mixtral")
    with pytest.raises(RuntimeError, match=r"not connected: call Backbone\.connect"):
        logits(load_backbone(tmp_path).model)


def test_a_backbone_needs_a_callable_for_every_layer(tmp_path: Path):
    save_checkpoint(tmp_path, "mixtral")
    with pytest.raises(ValueError, match="has 2 MoE layers, but 1 are given"):
        load_backbone(tmp_path).connect([echo])


def test_each_layer_calls_its_own_callable_in_order(tmp_path: Path):
    save_checkpoint(tmp_path, "mixtral", num_hidden_layers=3)
    backbone = load_backbone(tmp_path)
    calls = []

    def layer(number: int):
        def run(x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
            calls.append((number, tuple(x_TH.shape), tuple(index_TK.shape), tuple(weights_TK.shape)))
            return x_TH

        return run

    backbone.connect([layer(number) for number in range(3)])
    logits(backbone.model)
    assert calls == [(number, (4, 32), (4, 2), (4, 2)) for number in range(3)]


def test_a_model_in_memory_gives_its_experts_up(tmp_path: Path):
    model = save_checkpoint(tmp_path, "mixtral")
    whole = sum(tensor.numel() for tensor in model.parameters())
    experts = count_expert_parameters(model)
    backbone = attach_model(model)
    assert backbone.model is model
    assert backbone.num_experts == (6, 6)
    assert count_expert_parameters(model) == 0
    assert sum(tensor.numel() for tensor in model.parameters()) == whole - experts
    loaded = load_backbone(tmp_path)
    backbone.connect([echo, echo])
    loaded.connect([echo, echo])
    assert torch.equal(logits(model), logits(loaded.model))


def test_a_dense_model_has_nothing_to_give_up():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(CheckpointError, match="'llama' has no experts that can be served elsewhere"):
        attach_model(transformers.LlamaForCausalLM(config))


def test_a_missing_dense_weight_is_an_error(tmp_path: Path):
    save_checkpoint(tmp_path, "mixtral")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no weight for model\.layers\.1\.self_attn\.o_proj\.weight \(1 "):
        load_backbone(tmp_path)


def test_a_dense_weight_of_another_shape_is_an_error(tmp_path: Path):
    save_checkpoint(tmp_path, "mixtral")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"stores model\.norm\.weight as \[31\], but its config expects \[32\]"):
        load_backbone(tmp_path)


def test_a_tensor_that_the_experts_do_not_have_is_an_error(tmp_path: Path):
    save_checkpoint(tmp_path, "gpt_oss")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scale"] = torch.ones(6)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"stores model\.layers\.0\.mlp\.experts\.down_proj_scale, which"):
        load_backbone(tmp_path)


def test_an_architecture_without_the_experts_interface_is_refused(tmp_path: Path):
    transformers.LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    save_file({"unused": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="'llama' has no experts that can be served elsewhere"):
        load_backbone(tmp_path)
