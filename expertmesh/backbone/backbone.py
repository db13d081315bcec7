"""A model without its experts: loaded so, or made so from a model in memory.

Owns the transformers model and the order of its MoE layers. Knows nothing of hosts or of the network: each layer is a
callable that somebody connects. Invariant: the experts' parameters are never allocated (`load_backbone`) or are let go
(`attach_model`), and no other weight is missing.
"""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.backbone.experts import IMPLEMENTATION, MoeLayerFn, empty_experts
from expertmesh.checkpoint.architecture import (
    build_skeleton,
    choose_dtype,
    find_experts,
    find_model_class,
    require_experts,
)
from expertmesh.checkpoint.source import stored_tensors
from expertmesh.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)

_load_lock = threading.Lock()
"""transformers sets the process's default dtype while it constructs a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A transformers model, in evaluation mode and without gradients, whose experts are elsewhere."""

    model: Any
    """The `PreTrainedModel`. Its forward and generate work once the layers are connected."""
    moe_modules: tuple[Any, ...]
    """The emptied experts modules; the n-th is MoE layer n of the checkpoint's index."""

    @property
    def num_experts(self) -> tuple[int, ...]:
        """Per MoE layer."""
        return tuple(module.num_experts for module in self.moe_modules)

    def connect(self, layers: Sequence[MoeLayerFn]) -> None:
        """Let each MoE layer call its entry of `layers`. May be called again, to connect elsewhere."""
        if len(layers) != len(self.moe_modules):
            raise ValueError(f"the model has {len(self.moe_modules)} MoE layers, but {len(layers)} are given")
        for module, layer in zip(self.moe_modules, layers, strict=True):
            module.mesh_layer = layer


def load_backbone(
    path: Path,
    *,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    auto_class: str | None = None,
) -> Backbone:
    """Load the checkpoint in a folder without its experts.

    `dtype` None takes the checkpoint's own; `attn_implementation` is transformers'; `auto_class` must be what the
    checkpoint was indexed with. Raises CheckpointError if the architecture has no experts interface, or if a weight
    other than the experts' is missing or misshapen.
    """
    model_class, config = find_model_class(path, auto_class)
    dtype = choose_dtype(dtype, config, stored_tensors(path))
    build_skeleton(model_class, config)
    with _load_lock:
        try:
            model, info = _without_experts(model_class).from_pretrained(
                path,
                config=config,
                dtype=getattr(torch, dtype),
                experts_implementation=IMPLEMENTATION,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                **({} if attn_implementation is None else {"attn_implementation": attn_implementation}),
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"transformers cannot load {path}: {str(error).strip().splitlines()[0]}") from error
    model.__class__ = model_class
    del model._keys_to_ignore_on_load_unexpected
    _check_loaded(path, model, info)
    model.requires_grad_(False)
    return Backbone(model=model, moe_modules=tuple(find_experts(model).values()))


def attach_model(model: Any) -> Backbone:
    """Take the experts out of a model that is in memory, freeing what they used, and make it ready to connect.

    The model is changed in place. Raises CheckpointError if its architecture has no experts interface.
    """
    experts = require_experts(model)
    model.set_experts_implementation(IMPLEMENTATION)
    for module in experts.values():
        assert module.config._experts_implementation == IMPLEMENTATION
        empty_experts(module)
    model.eval().requires_grad_(False)
    return Backbone(model=model, moe_modules=tuple(experts.values()))


def count_expert_parameters(model: torch.nn.Module) -> int:
    """How many numbers the experts modules themselves hold: 0 for every backbone."""
    return sum(
        parameter.numel() for module in find_experts(model).values() for parameter in module.parameters(recurse=False)
    )


def _without_experts(model_class: type[Any]) -> type[Any]:
    """`model_class`, with every instance emptied of its experts' parameters as it is constructed.

    transformers constructs on the meta device and then loads what the model has a place for, so that the experts never
    take memory. A subclass, rather than a patch of the experts class, because it changes nothing for other threads; it
    is named like its parent because transformers looks at names.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        gone = [
            f"^{re.escape(name)}\\.{parameter}$"
            for name, module in find_experts(self).items()
            for parameter in empty_experts(module)
        ]
        self._keys_to_ignore_on_load_unexpected = {*(model_class._keys_to_ignore_on_load_unexpected or ()), *gone}

    body = {"__init__": __init__, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), body)


def _check_loaded(path: Path, model: Any, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{path} has no weight for {missing[0]} ({len(missing)} are missing in all)")
    unexpected = sorted(info["unexpected_keys"])
    for name in find_experts(model):
        unknown = [key for key in unexpected if key.startswith(f"{name}.")]
        if unknown:
            raise CheckpointError(f"{path} stores {unknown[0]}, which this architecture's experts do not have")
    if unexpected:
        _log.warning("%s stores weights that the model does not use, such as %s", path, unexpected[0])
