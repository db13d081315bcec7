"""Every architecture whose experts are served, and a tiny random checkpoint of each.

Those that have transformers' experts interface are read from its own sources, so that an architecture new to a release
cannot be forgotten; the others are those that expertmesh.families has a word for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers

from expertmesh.families import PLAIN
from tests.architectures.configs import tiny_config

_MODEL_TYPES = {
    "inkling": "inkling_text",  # the whole model's vision tower needs scipy to be constructed
    "qwen3_omni_moe": "qwen3_omni_moe_thinker",
}
"""Where the model to test is not the one named like its folder."""

_PLAIN = {
    "DbrxExperts": "dbrx",
    "JetMoeMoE": "jetmoe",
    "Llama4TextMoe": "llama4_text",
    "LongcatFlashExperts": "longcat_flash",
    "NllbMoeSparseMLP": "nllb-moe",
    "Step3p7Experts": "step3p7",
    "SwitchTransformersExperts": "switch_transformers",
}

_AUTO_CLASSES = {"openai_privacy_filter": "AutoModelForTokenClassification"}

SKIPPED = {"Qwen3OmniMoeTalkerTextExperts": "writes speech codes from another model's states, never text"}
"""Experts classes that are not served, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One experts class, and the model that it is tested in."""

    experts_class: str
    model_type: str
    auto_class: str | None
    """None: the one that is found without being named."""

    @property
    def generates(self) -> bool:
        """Whether it writes one token after another."""
        return self.auto_class is None and self.model_type != "diffusion_gemma"


def find_architectures() -> list[Architecture]:
    """One for each class in transformers that is decorated with `@use_experts_implementation`, or of another family."""
    models = Path(transformers.__file__).parent / "models"
    found = []
    for source in sorted(models.glob("*/modeling_*.py")):
        for experts_class in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", source.read_text(), re.M):
            folder = source.parent.name
            model_type = _MODEL_TYPES.get(folder, folder)
            auto_class = _AUTO_CLASSES.get(folder)
            found.append(Architecture(experts_class=experts_class, model_type=model_type, auto_class=auto_class))
    assert _PLAIN.keys() == PLAIN.keys(), "a family has no tiny checkpoint to be tested with"
    return found + [
        Architecture(experts_class=experts_class, model_type=model_type, auto_class=None)
        for experts_class, model_type in _PLAIN.items()
    ]


def build_model(architecture: Architecture, *, mended: bool = True, **overrides: Any) -> Any:
    """A tiny random model, the same at every call, that computes its experts in transformers' plainest way.

    `mended`: where that is wrong, in a plain way of our own.
    """
    config = tiny_config(architecture.model_type, **overrides)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    names = [
        architecture.auto_class or "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForSeq2SeqLM",
    ]
    auto_class = next(
        auto for auto in (getattr(transformers, name) for name in names) if type(config) in auto._model_mapping
    )
    model = auto_class.from_config(config).eval()
    for module in model.modules():
        if mended and type(module).__name__ == "NllbMoeExperts":
            module.forward = MethodType(_every_expert, module)
    return model


def _every_expert(
    experts: Any, x_TH: torch.Tensor, _is_first_TE: torch.Tensor, weights_TE: torch.Tensor
) -> torch.Tensor:
    """Sum what every expert of NLLB-MoE makes of every token, by what the gate gives it: 0 for most."""
    share = 1 - experts.moe_token_dropout
    return sum(experts[f"expert_{e}"](x_TH) * weights_TE[:, e : e + 1] * share for e in range(experts.num_experts))


def save_checkpoint(folder: Path, model_type: str, *, max_shard_size: str = "1GB", **overrides: Any) -> Any:
    """Save a tiny random checkpoint of `model_type` as its authors would store it, and return the model."""
    model = build_model(Architecture(experts_class="", model_type=model_type, auto_class=None), **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
