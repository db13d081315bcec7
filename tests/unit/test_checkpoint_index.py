"""Indexing a checkpoint's experts, against the parameters of the transformers model that was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.read import ExpertReader, read_expert
from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.families import find_experts
from expertmesh.ids import ExpertId
from expertmesh.kernels.spec import Activation, ExpertSpec
from tests.architectures.checkpoints import save_checkpoint
from tests.architectures.configs import tiny_config

FILE = "model.safetensors"


def layers(model: Any) -> list[Any]:
    return [module for module, _ in find_experts(model).values()]


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def assert_reads_as_stacked(folder: Path, model: Any) -> None:
    """Every expert read by recipe is its slice of the model's own [E, 2I, H] and [E, H, I]."""
    index = index_checkpoint(folder)
    assert index.num_layers == len(layers(model))
    with ExpertReader(folder) as reader:
        for expert, recipe in index.recipes.items():
            weights = reader.read(recipe, index.specs[expert.layer])
            assert torch.equal(weights.w_in, layers(model)[expert.layer].gate_up_proj[expert.index])
            assert torch.equal(weights.w_out, layers(model)[expert.layer].down_proj[expert.index])


def test_an_index_says_the_shape_and_number_of_every_layers_experts(tmp_path: Path):
    save_checkpoint(tmp_path, "mixtral")
    index = index_checkpoint(tmp_path)
    spec = ExpertSpec(hidden=32, intermediate=48, activation=Activation(name="silu"), dtype="float32")
    assert index.root == str(tmp_path)
    assert index.specs == (spec, spec)
    assert index.num_experts == (6, 6)
    assert set(index.recipes) == {ExpertId(layer, expert) for layer in range(2) for expert in range(6)}


def test_a_dense_layer_has_no_number(tmp_path: Path):
    save_checkpoint(tmp_path, "deepseek_v3", num_hidden_layers=3, first_k_dense_replace=2)
    index = index_checkpoint(tmp_path)
    assert index.num_layers == 1
    assert index.recipes[ExpertId(0, 0)].w_out.sources[0].name == "model.layers.2.mlp.experts.0.down_proj.weight"


def test_experts_stored_one_by_one_are_read(tmp_path: Path):
    assert_reads_as_stacked(tmp_path, save_checkpoint(tmp_path, "mixtral"))


def test_experts_past_the_ninth_keep_their_number(tmp_path: Path):
    assert_reads_as_stacked(tmp_path, save_checkpoint(tmp_path, "qwen3_moe", num_local_experts=12))


def test_experts_stored_as_a_stack_are_read(tmp_path: Path):
    assert_reads_as_stacked(tmp_path, save_checkpoint(tmp_path, "granitemoe"))


def test_experts_stored_interleaved_are_read(tmp_path: Path):
    model = save_checkpoint(tmp_path, "inkling2")
    assert any("w13_weight" in name for name in load_file(tmp_path / FILE))
    assert_reads_as_stacked(tmp_path, model)


def test_experts_in_several_shards_are_read(tmp_path: Path):
    model = save_checkpoint(tmp_path, "mixtral", max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_reads_as_stacked(tmp_path, model)


def test_a_stack_that_is_stored_transposed_is_turned(tmp_path: Path):
    model = save_checkpoint(tmp_path, "qwen3_vl_moe")
    tensors = load_file(tmp_path / FILE)
    for name in tensors:
        if ".experts." in name:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / FILE)
    assert_reads_as_stacked(tmp_path, model)


def test_gpt_oss_is_turned_and_deinterleaved_with_its_biases(tmp_path: Path):
    module = layers(save_checkpoint(tmp_path, "gpt_oss"))[1]
    index = index_checkpoint(tmp_path)
    weights = read_expert(tmp_path, index.recipes[ExpertId(1, 3)], index.specs[1])
    rows = module.gate_up_proj[3].T
    assert index.specs[1].activation == Activation(name="swiglu_oai", limit=7.0, alpha=1.702)
    assert torch.equal(weights.w_in, torch.cat([rows[0::2], rows[1::2]]))
    assert torch.equal(weights.w_out, module.down_proj[3].T)
    assert weights.b_in is not None
    assert weights.b_out is not None
    assert torch.equal(weights.b_in, torch.cat([module.gate_up_proj_bias[3][0::2], module.gate_up_proj_bias[3][1::2]]))
    assert torch.equal(weights.b_out, module.down_proj_bias[3])


def test_experts_without_a_gate_are_read(tmp_path: Path):
    module = layers(save_checkpoint(tmp_path, "nemotron_h"))[0]
    index = index_checkpoint(tmp_path)
    weights = read_expert(tmp_path, index.recipes[ExpertId(0, 5)], index.specs[0])
    assert not index.specs[0].gated
    assert index.specs[0].activation == Activation(name="relu2")
    assert torch.equal(weights.w_in, module.up_proj[5])
    assert torch.equal(weights.w_out, module.down_proj[5])


def test_layers_may_have_experts_of_different_shapes(tmp_path: Path):
    save_checkpoint(tmp_path, "ernie4_5_vl_moe")
    assert [spec.intermediate for spec in index_checkpoint(tmp_path).specs] == [24, 16]


def test_the_constants_of_an_activation_come_from_the_config(tmp_path: Path):
    save_checkpoint(tmp_path, "gpt_oss", swiglu_limit=3.5, swiglu_alpha=1.25)
    assert index_checkpoint(tmp_path).specs[0].activation == Activation(name="swiglu_oai", limit=3.5, alpha=1.25)


@pytest.mark.parametrize(
    ("requested", "configured", "dtype"),
    [("float16", "bfloat16", "float16"), (None, "bfloat16", "bfloat16"), (None, None, "float32")],
)
def test_the_dtype_is_the_one_asked_for_or_the_configs_or_the_weights(
    requested: str | None, configured: str | None, dtype: str, tmp_path: Path
):
    save_checkpoint(tmp_path, "olmoe")
    change_config(tmp_path, dtype=configured)
    assert index_checkpoint(tmp_path, requested).specs[0].dtype == dtype


def test_an_unknown_dtype_is_the_users_error(tmp_path: Path):
    save_checkpoint(tmp_path, "olmoe")
    with pytest.raises(ConfigError, match="dtype 'int8' is not one of float32, bfloat16, float16"):
        index_checkpoint(tmp_path, "int8")


def test_a_missing_expert_is_an_error(tmp_path: Path):
    save_checkpoint(tmp_path, "mixtral")
    tensors = load_file(tmp_path / FILE)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj is incomplete.*w3.*5"):
        index_checkpoint(tmp_path)


def test_a_missing_stack_is_an_error(tmp_path: Path):
    save_checkpoint(tmp_path, "gpt_oss")
    tensors = load_file(tmp_path / FILE)
    del tensors["model.layers.0.mlp.experts.down_proj_bias"]
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"experts\.down_proj_bias has 6 experts, but 0 are stored"):
        index_checkpoint(tmp_path)


def test_weights_that_do_not_fit_the_config_are_an_error(tmp_path: Path):
    save_checkpoint(tmp_path, "olmoe")
    change_config(tmp_path, intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"expert 0: stored as .*gate_proj.* \[48, 32\].* expects \[80, 32\]"):
        index_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"num_hidden_layers": 1}),
        ("doge", {"num_hidden_layers": 1, "is_moe": True}),
    ],
)
def test_an_architecture_whose_experts_we_do_not_know_is_refused(
    model_type: str, settings: dict[str, Any], tmp_path: Path
):
    transformers.CONFIG_MAPPING[model_type](**settings).save_pretrained(tmp_path)
    save_file({"unused": torch.ones(1)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=rf"{model_type!r} has no experts .*@use_experts_implementation"):
        index_checkpoint(tmp_path)


def test_a_config_that_makes_no_model_is_refused(tmp_path: Path):
    save_checkpoint(tmp_path, "mixtral")
    change_config(tmp_path, hidden_act="no such function")
    with pytest.raises(CheckpointError, match=r"cannot construct MixtralForCausalLM from its config.*no such function"):
        index_checkpoint(tmp_path)


def test_an_architecture_that_writes_no_text_is_refused(tmp_path: Path):
    tiny_config("openai_privacy_filter").save_pretrained(tmp_path)
    save_file({"unused": torch.ones(1)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="'openai_privacy_filter' is no text generator"):
        index_checkpoint(tmp_path)


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "from_the_future"}')
    with pytest.raises(CheckpointError, match=r"transformers .* cannot read .*config\.json.*from_the_future"):
        index_checkpoint(tmp_path)


def test_a_quantized_checkpoint_is_refused(tmp_path: Path):
    save_checkpoint(tmp_path, "gpt_oss")
    change_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match="is quantized, which is not supported"):
        index_checkpoint(tmp_path)
