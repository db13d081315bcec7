"""Every architecture, its experts elsewhere, against the model as it is in transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from expertmesh.backbone import Gates, attach_model, count_expert_parameters, load_backbone
from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.source import resolve
from expertmesh.families import PLAIN
from expertmesh.testing.processes import ProcessCluster
from tests.architectures.checkpoints import SKIPPED, Architecture, build_model, find_architectures
from tests.architectures.configs import tiny_config
from tests.architectures.executor import HostExecutor

ARCHITECTURES = find_architectures()
TOLERANCE = 1e-4
KEEPS_ITS_GATE = {
    "DiffusionGemmaTextExperts": "says probabilities",
    "Gemma4TextExperts": "says probabilities",
    "ZayaExperts": "says 7 numbers of a token for 6 experts",
} | dict.fromkeys(PLAIN, "does not use transformers' experts interface")
"""Whose logits another gate cannot use, and why."""
PROMPT = torch.tensor([[17, 99, 5, 64, 23, 110, 42, 8, 77, 31]])


@pytest.fixture(autouse=True)
def quiet_transformers():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def executor() -> Iterator[HostExecutor]:
    with ProcessCluster(num_hosts=2) as cluster:
        yield HostExecutor(cluster)


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)  # one architecture draws its input
    written = {"decoder_input_ids": PROMPT[:, 4:9]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=PROMPT, **written).logits


def generate(model: Any) -> list[int]:
    options = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **options)[0].tolist()


def test_the_sources_of_transformers_name_all_architectures():
    assert len(ARCHITECTURES) >= 65
    assert set(SKIPPED) <= {architecture.experts_class for architecture in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.experts_class)
def test_an_architecture_answers_the_same_with_its_experts_elsewhere(
    architecture: Architecture, executor: HostExecutor, tmp_path: Path
):
    if architecture.experts_class in SKIPPED:
        pytest.skip(SKIPPED[architecture.experts_class])
    model = build_model(architecture)
    assert architecture.experts_class in {type(module).__name__ for module in model.modules()}
    expected = logits(model)
    model.save_pretrained(tmp_path)

    path = resolve(str(tmp_path))
    index = index_checkpoint(path, auto_class=architecture.auto_class)
    backbone = load_backbone(path, auto_class=architecture.auto_class)

    assert count_expert_parameters(backbone.model) == 0
    assert backbone.num_experts == index.num_experts
    obstacle = Gates(backbone).obstacle
    reason = KEEPS_ITS_GATE.get(architecture.experts_class)
    assert obstacle is None if reason is None else reason in obstacle
    with executor.run(index) as layers:
        backbone.connect(layers)
        torch.testing.assert_close(logits(backbone.model), expected, atol=TOLERANCE, rtol=0.0)
        if architecture.generates:
            assert generate(backbone.model) == generate(model)
        attached = attach_model(model)
        attached.connect(layers)
        torch.testing.assert_close(logits(attached.model), expected, atol=TOLERANCE, rtol=0.0)
    assert count_expert_parameters(model) == 0
    backbone.connect([lambda x_TH, index_TK, weights_TK: torch.zeros_like(x_TH)] * index.num_layers)
    effect = (logits(backbone.model) - expected).abs().max()
    assert effect > 100 * TOLERANCE, "the experts hardly matter to this model, so the test shows nothing"


@pytest.mark.parametrize(
    ("model_type", "text_class"),
    [("qwen3_5_moe", transformers.Qwen3_5MoeForCausalLM), ("llama4", transformers.Llama4ForCausalLM)],
)
def test_a_multimodal_checkpoint_is_served_by_its_text_model(
    model_type: str, text_class: type[Any], executor: HostExecutor, tmp_path: Path
):
    config = tiny_config(model_type)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    index, backbone = index_checkpoint(tmp_path), load_backbone(tmp_path)
    assert type(backbone.model) is text_class
    with executor.run(index) as layers:
        backbone.connect(layers)
        torch.testing.assert_close(logits(backbone.model), logits(model), atol=TOLERANCE, rtol=0.0)


def test_transformers_own_loop_over_the_experts_of_nllb_still_needs_mending():
    """It calls the first two experts, whatever the gate chose: so `build_model` puts a plain loop in its place."""
    architecture = next(each for each in ARCHITECTURES if each.model_type == "nllb-moe")
    as_it_is = build_model(architecture, mended=False)
    before = logits(as_it_is)
    for name, parameter in as_it_is.named_parameters():
        if re.search(r"expert_[2-9]", name):
            parameter.data.zero_()
    assert torch.equal(logits(as_it_is), before)
