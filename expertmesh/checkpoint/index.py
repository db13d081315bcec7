"""The index of a checkpoint: for every (layer, expert), the recipe that reads it into the slot layout.

Made once, with transformers' own conversion mapping on the model's skeleton; no tensor data is read. Knows no
architecture by name. Invariant: every recipe of an index makes tensors of its spec's shapes.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from expertmesh.checkpoint.architecture import read_architecture
from expertmesh.checkpoint.conversion import (
    UnsupportedConversionError,
    convert,
    deinterleave,
    join,
    shape_of,
    slice_flat,
    slice_stacked,
    stack_singles,
    transpose,
)
from expertmesh.checkpoint.recipe import CheckpointIndex, ExpertRecipe
from expertmesh.checkpoint.source import stored_tensors
from expertmesh.errors import CheckpointError
from expertmesh.families import find_experts
from expertmesh.ids import ExpertId
from expertmesh.kernels.activation import ACTIVATIONS, POINTWISE, match_activation
from expertmesh.kernels.spec import Activation, ExpertSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from expertmesh.checkpoint.conversion import Named, Stack
    from expertmesh.checkpoint.source import StoredTensor
    from expertmesh.families import Layout, Parameter

_CONSTANTS = ("limit", "alpha", "softcap")


def index_checkpoint(
    path: Path,
    dtype: str | None = None,
    auto_class: str | None = None,
    weight_format: str = "dense",
    *,
    portable: bool = False,
) -> CheckpointIndex:
    """Index the experts of the checkpoint in a folder, for slots of `dtype` (None: the checkpoint's own).

    `weight_format` and `portable` are those of `ExpertSpec`.
    `auto_class` must be what the backbone is loaded with: it decides which layers there are (see `read_architecture`).
    Raises CheckpointError if the architecture keeps its experts where or how they cannot be served, or if a tensor is
    missing or has a shape that the architecture does not expect.
    """
    architecture = read_architecture(path, dtype=dtype, auto_class=auto_class)
    skeleton = architecture.build_skeleton()
    stored = stored_tensors(path)
    experts = find_experts(skeleton)
    layouts = {name: family.layout(module) for name, (module, family) in experts.items()}
    specs = tuple(
        replace(_spec(module, layouts[name], architecture.dtype), weight_format=weight_format, portable=portable)
        for name, (module, _) in experts.items()
    )
    recipes: dict[ExpertId, ExpertRecipe] = {}
    try:
        stacks = _follow(skeleton, layouts, stored)
        for layer, (name, layout) in enumerate(layouts.items()):
            for index, recipe in enumerate(_layer_recipes(name, layout, stacks)):
                _check_shapes(f"{name}, expert {index}", recipe, specs[layer], stored)
                recipes[ExpertId(layer, index)] = recipe
    except UnsupportedConversionError as error:
        raise CheckpointError(
            f"architecture {skeleton.config.model_type!r} stores its experts in a way that is not supported: {error}"
        ) from error
    counts = tuple(layout.num_experts for layout in layouts.values())
    return CheckpointIndex(root=str(path), specs=specs, num_experts=counts, recipes=recipes)


def _follow(skeleton: Any, layouts: Mapping[str, Layout], stored: Mapping[str, StoredTensor]) -> dict[str, Stack]:
    """Every experts parameter of the model, by its full name, as recipes in the model's own layout."""
    wanted = {
        f"{name}.{own_name}": (parameter, layout.num_experts)
        for name, layout in layouts.items()
        for parameter in layout.parameters
        for own_name in parameter.names(layout.num_experts)
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
            stacks[target] = _slice((key, stored[key]), *wanted[target])
        else:
            collected[target][pattern].append((key, stored[key]))
    for target, lists in collected.items():
        converter = converter_of[next(iter(lists))]
        found = {pattern: len(lists[pattern]) for pattern in converter.source_patterns}
        if len(set(found.values())) > 1:
            raise CheckpointError(f"{target} is incomplete: its stored tensors are {found}")
        targets = converter.target_patterns
        made = convert(converter.operations, lists, converter.source_patterns, targets, tuple(parameters[target].shape))
        stacks.update({target.replace(targets[0], pattern): stack for pattern, stack in made.items()})
    for one, other in skeleton.all_tied_weights_keys.items():  # a checkpoint stores either
        for absent, present in ((one, other), (other, one)):
            if absent in wanted and present in stacks:
                stacks.setdefault(absent, stacks[present])
    return stacks


def _slice(tensor: Named, parameter: Parameter, num_experts: int) -> Stack:
    """The experts of a tensor that is stored as the model has it."""
    match parameter.kept:
        case "stacked":
            return slice_stacked(tensor)
        case "flat":
            return slice_flat(tensor, num_experts)
        case "each":
            return stack_singles([tensor])


def _layer_recipes(name: str, layout: Layout, stacks: Mapping[str, Stack]) -> list[ExpertRecipe]:
    """One layer's experts, from the module's own layout to the slot's."""
    num_experts = layout.num_experts

    def take(parameter: Parameter) -> Stack:
        names = [f"{name}.{of}" for of in parameter.names(num_experts)]
        stack = tuple(recipe for of in names for recipe in stacks.get(of, ()))
        if len(stack) == num_experts + parameter.num_spare:
            stack = stack[:num_experts]
        if len(stack) != num_experts:
            what = f"{name}.{parameter.name}"
            raise CheckpointError(f"{what} has {num_experts} experts, but {len(stack)} are stored")
        if parameter.transposed:
            stack = transpose(stack)
        return deinterleave(stack) if parameter.interleaved else stack

    parts, w_out = [take(parameter) for parameter in layout.w_in], take(layout.w_out)
    w_in = parts[0] if len(parts) == 1 else join(parts)
    if layout.b_in is None or layout.b_out is None:
        return [ExpertRecipe(w_in=a, w_out=b) for a, b in zip(w_in, w_out, strict=True)]
    biases = zip(take(layout.b_in), take(layout.b_out), strict=True)
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


def _spec(module: Any, layout: Layout, dtype: str) -> ExpertSpec:
    return ExpertSpec(
        hidden=layout.hidden,
        intermediate=layout.intermediate,
        gated=layout.gated,
        bias=layout.b_in is not None,
        activation=match_activation(layout.activate, gated=layout.gated, candidates=_guess_activations(module)),
        dtype=dtype,
    )


def _guess_activations(module: Any) -> list[Activation]:
    """Every activation with constants, with each of the numbers by which the module or its config may mean them."""
    settings = {**vars(getattr(module, "config", module)), **vars(module)}
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
