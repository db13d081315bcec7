"""The index of a checkpoint: for every (layer, expert), the recipe that reads it into the slot layout.

Made once, with transformers' own conversion mapping on the model's skeleton; no tensor data is read. Knows no
architecture by name. Invariant: every recipe of an index makes tensors of its spec's shapes.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from expertmesh.checkpoint.architecture import find_experts, read_architecture
from expertmesh.checkpoint.conversion import (
    UnsupportedConversionError,
    convert,
    deinterleave,
    shape_of,
    slice_stacked,
    transpose,
)
from expertmesh.checkpoint.recipe import CheckpointIndex, ExpertRecipe
from expertmesh.checkpoint.source import stored_tensors
from expertmesh.errors import CheckpointError
from expertmesh.ids import ExpertId
from expertmesh.kernels.activation import ACTIVATIONS, POINTWISE, match_activation
from expertmesh.kernels.spec import Activation, ExpertSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from expertmesh.checkpoint.conversion import Named, Stack
    from expertmesh.checkpoint.source import StoredTensor

_CONSTANTS = ("limit", "alpha", "softcap")


def index_checkpoint(
    path: Path, dtype: str | None = None, auto_class: str | None = None, weight_format: str = "dense"
) -> CheckpointIndex:
    """Index the experts of the checkpoint in a folder, for slots of `dtype` (None: the checkpoint's own) and one of
    `kernels.formats.FORMATS`.

    `auto_class` must be what the backbone is loaded with: it decides which layers there are (see `read_architecture`).
    Raises CheckpointError if the architecture keeps its experts where or how they cannot be served, or if a tensor is
    missing or has a shape that the architecture does not expect.
    """
    architecture = read_architecture(path, dtype=dtype, auto_class=auto_class)
    skeleton = architecture.build_skeleton()
    stored = stored_tensors(path)
    experts = find_experts(skeleton)
    specs = tuple(_spec(module, architecture.dtype, weight_format) for module in experts.values())
    recipes: dict[ExpertId, ExpertRecipe] = {}
    try:
        stacks = _follow(skeleton, experts, stored)
        for layer, (name, module) in enumerate(experts.items()):
            for index, recipe in enumerate(_layer_recipes(name, module, stacks)):
                _check_shapes(f"{name}, expert {index}", recipe, specs[layer], stored)
                recipes[ExpertId(layer, index)] = recipe
    except UnsupportedConversionError as error:
        raise CheckpointError(
            f"architecture {skeleton.config.model_type!r} stores its experts in a way that is not supported: {error}"
        ) from error
    counts = tuple(module.num_experts for module in experts.values())
    return CheckpointIndex(root=str(path), specs=specs, num_experts=counts, recipes=recipes)


def _follow(skeleton: Any, experts: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, Stack]:
    """Every experts parameter of the model, by its full name, as recipes in the model's own layout."""
    wanted = {
        f"{name}.{parameter}": tuple(tensor.shape)
        for name, module in experts.items()
        for parameter, tensor in module.named_parameters(recurse=False)
    }
    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = skeleton.state_dict()
    stacks: dict[str, Stack] = {}
    collected: dict[str, dict[str, list[Named]]] = defaultdict(lambda: defaultdict(list))
    # In transformers' order: where an expert has tensors of its own, its number is the position among them.
    for key in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, parameters)
        if target not in parameters and key in parameters:
            target, pattern = key, None
        if target not in wanted:
            continue
        if pattern is None:
            stacks[target] = slice_stacked((key, stored[key]))
        else:
            collected[target][pattern].append((key, stored[key]))
    for target, lists in collected.items():
        converter = converter_of[next(iter(lists))]
        found = {pattern: len(lists[pattern]) for pattern in converter.source_patterns}
        if len(set(found.values())) > 1:
            raise CheckpointError(f"{target} is incomplete: its stored tensors are {found}")
        targets = converter.target_patterns
        made = convert(converter.operations, lists, converter.source_patterns, targets, wanted[target])
        stacks.update({target.replace(targets[0], pattern): stack for pattern, stack in made.items()})
    for one, other in skeleton.all_tied_weights_keys.items():  # a checkpoint stores either
        for absent, present in ((one, other), (other, one)):
            if absent in wanted and present in stacks:
                stacks.setdefault(absent, stacks[present])
    return stacks


def _layer_recipes(name: str, module: Any, stacks: Mapping[str, Stack]) -> list[ExpertRecipe]:
    """One layer's experts, from the module's own layout to the slot's."""
    into = "gate_up_proj" if module.has_gate else "up_proj"
    interleaved = module.has_gate and not module.is_concatenated

    def take(parameter: str) -> Stack:
        stack = stacks.get(f"{name}.{parameter}", ())
        if len(stack) != module.num_experts:
            raise CheckpointError(f"{name}.{parameter} has {module.num_experts} experts, but {len(stack)} are stored")
        if module.is_transposed and not parameter.endswith("bias"):
            stack = transpose(stack)
        return deinterleave(stack) if interleaved and parameter.startswith(into) else stack

    w_in, w_out = take(into), take("down_proj")
    if not module.has_bias:
        return [ExpertRecipe(w_in=a, w_out=b) for a, b in zip(w_in, w_out, strict=True)]
    biases = zip(take(f"{into}_bias"), take("down_proj_bias"), strict=True)
    return [ExpertRecipe(w_in=a, w_out=b, b_in=c, b_out=d) for a, b, (c, d) in zip(w_in, w_out, biases, strict=True)]


def _check_shapes(what: str, recipe: ExpertRecipe, spec: ExpertSpec, stored: Mapping[str, StoredTensor]) -> None:
    expected = {
        recipe.w_in: (spec.rows_in, spec.hidden),
        recipe.w_out: (spec.hidden, spec.intermediate),
        recipe.b_in: (spec.rows_in,),
        recipe.b_out: (spec.hidden,),
    }
    for tensor, shape in expected.items():
        if tensor is not None and shape_of(tensor, stored) != shape:
            names = ", ".join(f"{source.name} {list(stored[source.name].shape)}" for source in tensor.sources)
            raise CheckpointError(f"{what}: stored as {names}, but the config expects {list(shape)} per expert")


def _spec(module: Any, dtype: str, weight_format: str) -> ExpertSpec:
    rows, columns = module.down_proj.shape[1:]
    hidden, intermediate = (columns, rows) if module.is_transposed else (rows, columns)
    return ExpertSpec(
        hidden=hidden,
        intermediate=intermediate,
        gated=module.has_gate,
        bias=module.has_bias,
        activation=_activation(module),
        dtype=dtype,
        weight_format=weight_format,
    )


def _activation(module: Any) -> Activation:
    """The activation that behaves as the module's own does."""

    def apply(h_RI: torch.Tensor) -> torch.Tensor:
        if not module.has_gate:
            return module.act_fn(h_RI)  # type: ignore[no-any-return]
        if not module.is_concatenated:
            h_RI = torch.stack(h_RI.chunk(2, dim=-1), dim=-1).flatten(-2)
        return module._apply_gate(h_RI)  # type: ignore[no-any-return]

    return match_activation(apply, gated=module.has_gate, candidates=_guess_activations(module))


def _guess_activations(module: Any) -> list[Activation]:
    """Every activation with constants, with each of the numbers by which the module or its config may mean them."""
    settings = {**vars(module.config), **vars(module)}
    numbers = {
        float(value)
        for name, value in settings.items()
        if any(word in name for word in _CONSTANTS) and isinstance(value, int | float) and value > 0
    }
    constants = itertools.product(sorted(numbers), sorted({1.0, *numbers}))
    return [
        Activation(name=name, limit=limit, alpha=alpha)
        for limit, alpha in constants
        for name in sorted(ACTIVATIONS - POINTWISE.keys())
    ]
