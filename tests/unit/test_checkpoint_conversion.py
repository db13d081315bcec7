"""Following transformers' weight conversions on recipes: what cannot be expressed is refused."""

from __future__ import annotations

import pytest
from transformers.core_model_loading import Chunk, Concatenate, Interleave, MergeModulelist, Transpose

from expertmesh.checkpoint.conversion import UnsupportedConversionError, convert, shape_of
from expertmesh.checkpoint.recipe import TensorRecipe, TensorSource
from expertmesh.checkpoint.source import StoredTensor

STORED = {
    name: StoredTensor(file="f", dtype="F32", shape=shape)
    for name, shape in {"stack": (2, 6, 4), "gate.0": (3, 4), "gate.1": (3, 4), "up.0": (3, 4), "up.1": (3, 4)}.items()
}
STACK = {"stack": [("stack", STORED["stack"])]}


def follow(*operations: object, shape: tuple[int, ...] = (2, 6, 4)) -> tuple[TensorRecipe, ...]:
    return convert(list(operations), STACK, ["stack"], ["target"], shape)["target"]


def source(name: str, index: int | None = None) -> TensorSource:
    return TensorSource(file="f", name=name, index=index)


def test_merged_and_concatenated_parts_make_one_recipe_per_expert():
    collected = {kind: [(f"{kind}.{e}", STORED[f"{kind}.{e}"]) for e in range(2)] for kind in ("up", "gate")}
    made = convert([MergeModulelist(dim=0), Concatenate(dim=1)], collected, ["gate", "up"], ["target"], (2, 6, 4))
    assert made == {
        "target": tuple(TensorRecipe(sources=(source(f"gate.{e}"), source(f"up.{e}"))) for e in range(2)),
    }


def test_a_stack_is_cut_into_experts():
    assert follow(Interleave(dim=1)) == tuple(
        TensorRecipe(sources=(source("stack", e),), deinterleave=True) for e in range(2)
    )


@pytest.mark.parametrize(("shape", "turned"), [((2, 6, 4), False), ((2, 4, 6), True)])
def test_a_checked_transposition_depends_on_the_shape_in_the_model(shape: tuple[int, ...], turned: bool):
    assert [recipe.transpose for recipe in follow(Transpose(1, 2, check_dims=True), shape=shape)] == [turned, turned]


@pytest.mark.parametrize(
    "operations",
    [
        [Chunk(dim=1)],
        [Concatenate(dim=2)],
        [Interleave(dim=2)],
        [Interleave(dim=1, inverse=True)],
        [Transpose(0, 1)],
        [Interleave(dim=1), MergeModulelist(dim=0)],
        [Concatenate(dim=1), Transpose(1, 2, check_dims=True)],
        [Interleave(dim=1), Interleave(dim=1)],
        [Interleave(dim=1), Transpose(1, 2)],
        [Interleave(dim=1), Concatenate(dim=1)],
    ],
    ids=repr,
)
def test_an_operation_that_no_recipe_expresses_is_refused(operations: list[object]):
    with pytest.raises(UnsupportedConversionError):
        follow(*operations)


def test_the_shape_of_a_recipe_counts_every_source_after_its_transposition():
    assert shape_of(TensorRecipe(sources=(source("stack", 0),), transpose=True), STORED) == (4, 6)
    assert shape_of(TensorRecipe(sources=(source("gate.0"), source("up.0"))), STORED) == (6, 4)
    assert shape_of(TensorRecipe(sources=(source("gate.0"), source("stack", 1)), transpose=True), STORED) == ()
