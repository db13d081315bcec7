"""A checkpoint's architecture as transformers knows it: the model class, its skeleton, and the experts modules in it.

Needs transformers. A skeleton is the whole model on torch's meta device: every name and shape, no memory. The one
thing that an architecture must have is experts of a family that `expertmesh.families` knows.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.models.auto.auto_factory import _get_model_class

from expertmesh.checkpoint.source import stored_tensors
from expertmesh.errors import CheckpointError, ConfigError, ExpertMeshError
from expertmesh.families import find_experts
from expertmesh.ids import MAX_EXPERTS, MAX_LAYERS
from expertmesh.kernels.spec import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from expertmesh.families import Family

_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a checkpoint's config says, settled: which class to construct, of which config, in which dtype."""

    model_class: type[Any]
    config: Any
    dtype: str
    """One of `kernels.spec.DTYPES`."""

    def build_skeleton(self) -> Any:
        """The model on the meta device.

        Raises CheckpointError if the config or a missing package prevents it, or if no layer has experts that we know.
        """
        with blame_checkpoint(f"construct {self.model_class.__name__} from its config"), torch.device("meta"):
            skeleton = self.model_class._from_config(copy.deepcopy(self.config))
        require_experts(skeleton)
        return skeleton


def read_architecture(path: Path, *, dtype: str | None = None, auto_class: str | None = None) -> Architecture:
    """The architecture of the checkpoint in a folder.

    `dtype` None takes the checkpoint's own. `auto_class` names a class of transformers' such as
    "AutoModelForTokenClassification"; None takes the first that generates text and knows the architecture. A
    multimodal checkpoint of which transformers has a text-only class is served by that.

    Raises CheckpointError if transformers has no such class, or if the checkpoint is quantized or in an odd dtype;
    ConfigError if the dtype asked for is none of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    with blame_checkpoint(f"read {path / 'config.json'}"):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    _check_counts(path, config)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{path} is quantized, which is not supported: save it in bfloat16 first")
    own_dtype = str(config.dtype or config.get_text_config().dtype or _stored_dtype(path)).removeprefix("torch.")
    if dtype is None and own_dtype not in DTYPES:
        raise CheckpointError(f"{path} is in {own_dtype}: ask for a dtype, one of {', '.join(DTYPES)}")
    for name in (auto_class,) if auto_class is not None else _AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            break
    else:
        raise CheckpointError(f"architecture {config.model_type!r} is no text generator that transformers knows")
    model_class = _get_model_class(config, mapping)
    if model_class.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    return Architecture(model_class=model_class, config=config, dtype=dtype or own_dtype)


def _check_counts(path: Path, config: Any) -> None:
    """Refuse a model of absurdly many parts, each of which would be built. (Their sizes cost nothing.)"""
    for part in (config, config.get_text_config()):
        counts = {"num_hidden_layers": getattr(part, "num_hidden_layers", None), **vars(part)}
        for name, value in counts.items():
            most = MAX_LAYERS if name.endswith("layers") else MAX_EXPERTS if "experts" in name else None
            if most is not None and isinstance(value, int) and value > most:
                raise CheckpointError(f"{path / 'config.json'}: {name} is above {most}")


def _stored_dtype(path: Path) -> str:
    """That of the first stored float, for a config that names none."""
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return next((names[tensor.dtype] for tensor in stored_tensors(path).values() if tensor.dtype in names), "no float")


def require_experts(model: Any) -> dict[str, tuple[Any, Family]]:
    """`find_experts`, raising CheckpointError if there are none."""
    experts = find_experts(model)
    if not experts:
        raise CheckpointError(
            f"architecture {model.config.model_type!r} has no experts that can be served elsewhere: none of its layers "
            "uses transformers' experts interface (@use_experts_implementation) or is of a family that expertmesh knows"
        )
    return experts


@contextmanager
def blame_checkpoint(attempt: str) -> Iterator[None]:
    """Turn what transformers raises for a checkpoint that it cannot use into one clear CheckpointError."""
    try:
        yield
    except ExpertMeshError:
        raise
    except Exception as error:  # the library does not check a config: with a wrong one, anything may fail in it
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"transformers {transformers.__version__} cannot {attempt}: {cause}") from error
