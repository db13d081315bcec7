"""Reading one expert by its recipe: from the files' tensors to the slot's.

Needs torch and safetensors only, so that a host starts fast, and reads only the bytes of the expert asked for. Knows
nothing of architectures. Invariant: what it returns is in the spec's format, and every number read is finite.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open

from expertmesh.checkpoint.recipe import shape_of_part
from expertmesh.errors import CheckpointError, one_line
from expertmesh.kernels.quantization import quantize
from expertmesh.kernels.spec import ExpertSpec, ExpertWeights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from expertmesh.checkpoint.recipe import ExpertRecipe, TensorRecipe, TensorSource

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read_expert(root: Path, recipe: ExpertRecipe, spec: ExpertSpec) -> ExpertWeights:
    """Read one expert. To read several, open one `ExpertReader`."""
    with ExpertReader(root) as reader:
        return reader.read(recipe, spec)


class ExpertReader:
    """Reads experts of one checkpoint folder, keeping the files it opened mapped until it is closed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files. Idempotent."""
        self._files.clear()
        self._stack.close()

    def read(self, recipe: ExpertRecipe, spec: ExpertSpec) -> ExpertWeights:
        """One expert's tensors in slot layout, rounded to the spec's dtype and then quantized to its format.

        Raises CheckpointError, naming tensor and file, if one is missing, of another shape, of a dtype that is not a
        plain float, or holds a NaN or an infinity.
        """
        if not spec.bias == (recipe.b_in is not None) == (recipe.b_out is not None):
            raise CheckpointError(f"{self._name(recipe.w_in.sources[0])}: only one of recipe and spec has biases")
        b_in = b_out = None
        if recipe.b_in is not None and recipe.b_out is not None:
            b_in = self._build(recipe.b_in, (spec.rows_in,), spec.dtype)
            b_out = self._build(recipe.b_out, (spec.hidden,), spec.dtype)
        dense = ExpertWeights(
            w_in=self._build(recipe.w_in, (spec.rows_in, spec.hidden), spec.dtype),
            w_out=self._build(recipe.w_out, (spec.hidden, spec.intermediate), spec.dtype),
            b_in=b_in,
            b_out=b_out,
        )
        return quantize(dense, spec)

    def _build(self, recipe: TensorRecipe, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        # Before anything is read: a recipe may name a tensor of any size, any number of times.
        shapes = [self._shape(source)[:: -1 if recipe.transpose else 1] for source in recipe.sources]
        fit = all(shapes) and len({of[1:] for of in shapes}) == 1
        found = (sum(of[0] for of in shapes), *shapes[0][1:]) if fit else "none, as its parts do not fit together"
        if found != shape:
            raise CheckpointError(f"{self._name(recipe.sources[0])} makes a tensor of shape {found}, not {shape}")
        parts = [self._load(source, getattr(torch, dtype)) for source in recipe.sources]
        if recipe.transpose:
            parts = [part.T for part in parts]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if recipe.deinterleave:
            tensor = torch.cat((tensor[0::2], tensor[1::2]))
        return tensor.contiguous()

    def _shape(self, source: TensorSource) -> tuple[int, ...]:
        with self._blamed(source):
            shape = tuple(self._open(source.file).get_slice(source.name).get_shape())
            return shape_of_part(source, shape)

    @contextmanager
    def _blamed(self, source: TensorSource) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, IndexError) as error:
            raise CheckpointError(f"cannot read {self._name(source)}: {one_line(str(error))}") from error

    def _load(self, source: TensorSource, dtype: torch.dtype) -> torch.Tensor:
        with self._blamed(source):
            file = self._open(source.file)
            tensor: torch.Tensor
            if source.index is None:
                tensor = file.get_tensor(source.name)
            elif source.parts is None:
                tensor = file.get_slice(source.name)[source.index]
            else:
                num_rows = self._shape(source)[0]
                tensor = file.get_slice(source.name)[source.index * num_rows : (source.index + 1) * num_rows]
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{self._name(source)} is stored as {tensor.dtype}: quantized experts have no recipe")
        cast = tensor.to(dtype)
        if not all(bound.isfinite() for bound in torch.aminmax(cast)):  # one pass; a NaN reaches both bounds
            cause = f"does not fit in {dtype}" if tensor.isfinite().all() else "holds a NaN or an infinity"
            raise CheckpointError(f"{self._name(source)} {cause}")
        return cast

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self._root / file, framework="pt"))
        return self._files[file]

    def _name(self, source: TensorSource) -> str:
        expert = "" if source.index is None else f"[{source.index}]"
        return f"tensor {one_line(source.name)}{expert} of {self._root / source.file}"
