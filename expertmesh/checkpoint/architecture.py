"""Architectures as transformers knows them: a checkpoint's model class, its skeleton, and the experts modules in it.

Needs transformers. A skeleton is the whole model on torch's meta device: every name and shape, no memory. The one
interface that an architecture must have is transformers' experts interface (`@use_experts_implementation`).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.models.auto.auto_factory import _get_model_class

from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.kernels.spec import DTYPES

if TYPE_CHECKING:
    from pathlib import Path

    from expertmesh.checkpoint.source import StoredTensor

_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def find_model_class(path: Path, auto_class: str | None = None) -> tuple[type[Any], Any]:
    """A checkpoint's model class, and the config to construct it with.

    `auto_class` names a class of transformers' such as "AutoModelForTokenClassification"; None takes the first that
    generates text and knows the architecture. A multimodal checkpoint of which transformers has a text-only class
    is served by that. Raises CheckpointError if there is none, or if the weights are quantized.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        cause = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot use {path}/config.json: {cause}"
        ) from error
    for name in (auto_class,) if auto_class is not None else _AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            break
    else:
        raise CheckpointError(f"architecture {config.model_type!r} is no text generator that transformers knows")
    model_class = _get_model_class(config, mapping)
    if model_class.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{path} is quantized, which is not supported: save it in bfloat16 first")
    return model_class, config


def build_skeleton(model_class: type[Any], config: Any) -> Any:
    """The model on the meta device. Raises CheckpointError if none of its layers has the experts interface."""
    with torch.device("meta"):
        skeleton = model_class._from_config(copy.deepcopy(config))
    require_experts(skeleton)
    return skeleton


def find_experts(model: torch.nn.Module) -> dict[str, Any]:
    """The experts modules by name. Their order is that of the MoE layers: the n-th is layer n."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "_is_expert_parallel")}


def require_experts(model: Any) -> dict[str, Any]:
    """`find_experts`, raising CheckpointError if there are none."""
    experts = find_experts(model)
    if not experts:
        raise CheckpointError(
            f"architecture {model.config.model_type!r} has no experts that can be served elsewhere: none of its layers "
            "uses transformers' experts interface (@use_experts_implementation)"
        )
    return experts


def choose_dtype(requested: str | None, config: Any, stored: dict[str, StoredTensor]) -> str:
    """The dtype to load in: the one requested, else the config's, else the first stored weight's.

    Raises ConfigError for a request that is none of `DTYPES`, CheckpointError for a checkpoint that is stored in none.
    """
    if requested is not None:
        if requested not in DTYPES:
            raise ConfigError(f"dtype {requested!r} is not one of {', '.join(DTYPES)}")
        return requested
    configured = config.dtype or config.get_text_config().dtype
    if configured is not None:
        dtype = str(configured).removeprefix("torch.")
    else:
        dtype = next((_STORED_DTYPES[t.dtype] for t in stored.values() if t.dtype in _STORED_DTYPES), "none")
    if dtype not in DTYPES:
        raise CheckpointError(f"the checkpoint's dtype is {dtype}: give a dtype, one of {', '.join(DTYPES)}")
    return dtype
