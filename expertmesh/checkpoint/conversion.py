"""Transformers' weight conversions, followed on recipes instead of on tensors.

transformers turns a checkpoint's tensors into a model's by a chain of operations (stack the experts' tensors,
concatenate gate and up, transpose, ...). Here the same chain runs on what would be read: a `Stack` is the tensor of
all experts of a layer, as one recipe per expert. Knows no architecture by name. Invariant: an operation that a recipe
cannot express is refused, never approximated.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from transformers import core_model_loading as ops

from expertmesh.checkpoint.recipe import TensorRecipe, TensorSource, shape_of_part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expertmesh.checkpoint.source import StoredTensor

Stack: TypeAlias = "tuple[TensorRecipe, ...]"
"""A tensor [E, ...] of all experts of a layer: entry e is the recipe of [e]."""

Named: TypeAlias = "tuple[str, StoredTensor]"


class UnsupportedConversionError(Exception):
    """A step that no recipe can express."""


def convert(
    operations: Sequence[ops.ConversionOps],
    collected: Mapping[str, Sequence[Named]],
    source_patterns: Sequence[str],
    target_patterns: Sequence[str],
    target_shape: tuple[int, ...],
) -> dict[str, Stack]:
    """The stacks that `operations` make, by target pattern, from the stored tensors that matched each source pattern.

    `target_shape` is the shape of the first target in the model.
    """
    lists = {pattern: list(collected[pattern]) for pattern in source_patterns if pattern in collected}
    first, *rest = operations
    match first:
        case ops.MergeModulelist(dim=0):
            stacks = {pattern: stack_singles(tensors) for pattern, tensors in lists.items()}
        case ops.ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=1):
            stacks = _fuse_and_split(lists, target_patterns)
        case _:
            stacks = {pattern: slice_stacked(tensors[0]) for pattern, tensors in lists.items()}
            is_as_in_model = all(tensors[0][1].shape == target_shape for tensors in lists.values())
            if not (isinstance(first, ops.Transpose) and first.check_dims and is_as_in_model):
                rest = [first, *rest]
    for operation in rest:
        match operation:
            case ops.Concatenate(dim=1):
                stacks = {target_patterns[0]: join(list(stacks.values()))}
            case ops.Interleave(dim=1, inverse=False):
                stacks = {pattern: deinterleave(stack) for pattern, stack in stacks.items()}
            case ops.Transpose(dim0=1, dim1=2) if operation is first or not operation.check_dims:
                stacks = {pattern: transpose(stack) for pattern, stack in stacks.items()}
            case _:
                raise UnsupportedConversionError(f"by {operation!r}")
    if len(stacks) == len(target_patterns) == 1:
        return {target_patterns[0]: next(iter(stacks.values()))}
    return stacks


def slice_stacked(tensor: Named) -> Stack:
    """The experts of one stored tensor [E, ...]."""
    name, stored = tensor
    if not stored.shape or 0 in stored.shape:  # of an empty tensor, the number of experts could be anything
        raise UnsupportedConversionError(f"as {name}, a tensor of shape {list(stored.shape)}")
    return tuple(
        TensorRecipe(sources=(TensorSource(file=stored.file, name=name, index=index),))
        for index in range(stored.shape[0])
    )


def slice_flat(tensor: Named, num_experts: int) -> Stack:
    """The experts of one stored tensor [E * n, ...]."""
    name, stored = tensor
    if not stored.shape or stored.shape[0] % num_experts:
        raise UnsupportedConversionError(f"as {name}, a tensor of shape {list(stored.shape)}, {num_experts} of them")
    return tuple(
        TensorRecipe(sources=(TensorSource(file=stored.file, name=name, index=index, parts=num_experts),))
        for index in range(num_experts)
    )


def stack_singles(tensors: Sequence[Named]) -> Stack:
    """The experts of one stored tensor each, in order."""
    return tuple(
        TensorRecipe(sources=(TensorSource(file=stored.file, name=name, index=None),)) for name, stored in tensors
    )


def transpose(stack: Stack) -> Stack:
    """Swap rows and columns of every expert."""
    if any(recipe.deinterleave or len(recipe.sources) > 1 for recipe in stack):
        raise UnsupportedConversionError("transposed after it was joined or reordered")
    return tuple(replace(recipe, transpose=not recipe.transpose) for recipe in stack)


def deinterleave(stack: Stack) -> Stack:
    """Turn rows g0, u0, g1, u1, ... of every expert into g0, g1, ..., u0, u1, ..."""
    if any(recipe.deinterleave for recipe in stack):
        raise UnsupportedConversionError("reordered twice")
    return tuple(replace(recipe, deinterleave=True) for recipe in stack)


def join(stacks: Sequence[Stack]) -> Stack:
    """Join the rows of each expert."""
    recipes = [recipe for stack in stacks for recipe in stack]
    if any(recipe.deinterleave or recipe.transpose != recipes[0].transpose for recipe in recipes):
        raise UnsupportedConversionError("joined after its parts were reordered")
    return tuple(
        replace(parts[0], sources=tuple(source for part in parts for source in part.sources))
        for parts in zip(*stacks, strict=True)
    )


def _fuse_and_split(lists: Mapping[str, Sequence[Named]], target_patterns: Sequence[str]) -> dict[str, Stack]:
    """Each list holds one kind of tensor (gate, up) of the experts of the first target, then of the next, ..."""
    fused: dict[str, Stack] = {}
    for number, target in enumerate(target_patterns):
        parts: list[Stack] = []
        for tensors in lists.values():
            size = math.ceil(len(tensors) / len(target_patterns))
            parts.append(stack_singles(tensors[number * size : (number + 1) * size]))
        fused[target] = join(parts)
    return fused


def shape_of(recipe: TensorRecipe, stored: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    """The shape of the tensor that a recipe makes; () if its parts do not fit together."""
    shapes = [shape_of_part(source, stored[source.name].shape) for source in recipe.sources]
    if recipe.transpose:
        shapes = [shape[::-1] for shape in shapes]
    if len({shape[1:] for shape in shapes}) != 1:
        return ()
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
