"""A model without its experts: loaded so, or made so from a model in memory.

Owns the transformers model and the order of its MoE layers. Knows nothing of hosts or of the network: each layer is a
callable that somebody connects. Invariant: the experts' parameters are never allocated (`load_backbone`) or are let go
(`attach_model`), and no other weight is missing.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.backbone.experts import IMPLEMENTATION, empty_experts
from expertmesh.backbone.overlap import Overlap
from expertmesh.checkpoint.architecture import blame_checkpoint, read_architecture, require_experts
from expertmesh.errors import CheckpointError
from expertmesh.families import DECORATED, find_experts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from expertmesh.backbone.experts import MoeLayerFn

_load_lock = threading.Lock()
"""transformers sets the process's default dtype while it constructs a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A transformers model, in evaluation mode and without gradients, whose experts are elsewhere."""

    model: Any
    """The `PreTrainedModel`. Its forward and generate work once the layers are connected."""
    moe_modules: tuple[Any, ...]
    """The emptied experts modules; the n-th is MoE layer n of the checkpoint's index."""
    num_experts: tuple[int, ...]
    """Per MoE layer."""

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
    architecture = read_architecture(path, dtype=dtype, auto_class=auto_class)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _load_lock, blame_checkpoint(f"load {path}"):
        model, info = _without_experts(architecture.model_class).from_pretrained(
            path,
            config=architecture.config,
            dtype=getattr(torch, architecture.dtype),
            experts_implementation=IMPLEMENTATION,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
    model.__class__ = architecture.model_class
    del model._keys_to_ignore_on_load_unexpected
    _check_loaded(path, model, info)
    model.requires_grad_(False)
    return _backbone(model)


def attach_model(model: Any) -> Backbone:
    """Take the experts out of a model that is in memory, freeing what they used, and make it ready to connect.

    The model is changed in place. Raises CheckpointError if its architecture has no experts interface.
    """
    experts = require_experts(model)
    if any(family is DECORATED for _, family in experts.values()):
        model.set_experts_implementation(IMPLEMENTATION)
    for module, family in experts.values():
        is_ours = family is not DECORATED or module.config._experts_implementation == IMPLEMENTATION
        assert is_ours, "the model kept another implementation"
        empty_experts(module, family)
    model.eval().requires_grad_(False)
    return _backbone(model)


def count_expert_parameters(model: torch.nn.Module) -> int:
    """How many numbers the experts have in the model: 0 for every backbone."""
    own = dict(model.named_parameters())
    return sum(
        own[f"{name}.{parameter}"].numel()
        for name, (module, family) in find_experts(model).items()
        for parameter in family.layout(module).parameter_names
        if f"{name}.{parameter}" in own
    )


def _backbone(model: Any) -> Backbone:
    experts = find_experts(model)
    for name, (module, family) in experts.items():
        if family is DECORATED:
            module.mesh_overlap = Overlap.of(model.get_submodule(name.rpartition(".")[0]))
    return Backbone(
        model=model,
        moe_modules=tuple(module for module, _ in experts.values()),
        num_experts=tuple(family.layout(module).num_experts for module, family in experts.values()),
    )


def _without_experts(model_class: type[Any]) -> type[Any]:
    """`model_class`, with every instance emptied of its experts' parameters as it is constructed.

    transformers constructs on the meta device and then loads what the model has a place for, so that the experts never
    take memory. A subclass, rather than a patch of the experts class, because it changes nothing for other threads; it
    is named like its parent because transformers looks at names.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        layouts = {name: empty_experts(module, family) for name, (module, family) in require_experts(self).items()}
        gone = {f"{name}.{parameter}" for name, layout in layouts.items() for parameter in layout.parameter_names}
        patterns = {
            rf"^{re.escape(name)}\.{parameter.pattern}$"
            for name, layout in layouts.items()
            for parameter in layout.parameters
        }
        ignored = {*(model_class._keys_to_ignore_on_load_unexpected or ()), *patterns}
        self._keys_to_ignore_on_load_unexpected = ignored
        self.all_tied_weights_keys = {
            one: other for one, other in self.all_tied_weights_keys.items() if not gone & {one, other}
        }

    body = {"__init__": __init__, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), body)


def _check_loaded(path: Path, model: Any, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{path} has no weight for {missing[0]} ({len(missing)} are missing in all)")
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise CheckpointError(f"{path} stores {name} as {list(found)}, but its config expects {list(expected)}")
    # A weight that the dense model has no place for is in transformers' own report; of an expert it would be missed.
    experts = tuple(f"{name}." for name in find_experts(model))
    for key in sorted(info["unexpected_keys"]):
        if key.startswith(experts):
            raise CheckpointError(f"{path} stores {key}, which this architecture's experts do not have")
