"""How a host builds one expert from a checkpoint's files: plain data, made once by the index, followed by hosts.

Values only, so that a host needs neither transformers nor a model class to load an expert (design: a host's start is
most of a scale-up). `read.py` follows a recipe; `index.py` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from expertmesh.ids import ExpertId
    from expertmesh.kernels.spec import ExpertSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSource:
    """One stored tensor, or one expert's part of one that holds all experts'."""

    file: str
    """Relative to the checkpoint folder."""
    name: str
    """The tensor's key in the safetensors file."""
    index: int | None = None
    """Take `tensor[index]` along dimension 0; None takes the whole tensor."""
    parts: int | None = None
    """With an index: take instead the index-th of so many equal runs of rows."""


def shape_of_part(source: TensorSource, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a source takes of a stored tensor of this shape. Raises IndexError if it has no such part."""
    if source.index is None:
        return shape
    num_parts = source.parts if source.parts is not None else shape[0] if shape else 0
    if not (shape and source.index < num_parts and shape[0] % num_parts == 0):
        raise IndexError(f"its shape is {list(shape)}")
    return shape[1:] if source.parts is None else (shape[0] // num_parts, *shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecipe:
    """One slot tensor: the sources, joined along dimension 0 after each was transposed; then rows de-interleaved.

    `transpose` swaps the two dimensions of every source. `deinterleave` turns rows g0,u0,g1,u1,... into g0,g1,...,
    u0,u1,... (gpt-oss stores gate and up so). Both are no-ops on the layout that most checkpoints have.
    """

    sources: tuple[TensorSource, ...]
    transpose: bool = False
    deinterleave: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRecipe:
    """Where each tensor of one expert's slot comes from. Biases are None when the spec has none."""

    w_in: TensorRecipe
    w_out: TensorRecipe
    b_in: TensorRecipe | None = None
    b_out: TensorRecipe | None = None

    @property
    def files(self) -> list[str]:
        """All that it reads, relative to the checkpoint folder."""
        tensors = [tensor for tensor in (self.w_in, self.w_out, self.b_in, self.b_out) if tensor is not None]
        return sorted({source.file for tensor in tensors for source in tensor.sources})


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """All experts of one checkpoint: their shapes and how to read each."""

    root: str
    """The folder that the recipes' files are in."""
    specs: tuple[ExpertSpec, ...]
    """Per MoE layer, its experts' spec (layers share one spec in nearly every model)."""
    num_experts: tuple[int, ...]
    """Per MoE layer, how many experts it has."""
    recipes: Mapping[ExpertId, ExpertRecipe]

    @property
    def num_layers(self) -> int:
        """MoE layers only."""
        return len(self.specs)
