"""One expert in training, as a file: its float32 weights, its optimiser's state, and the step that both are of.

Knows neither hosts nor how training goes. Invariant: a file is there whole or not at all, and what is read from one has
the spec's shapes and fits together: weights and state of one step.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from expertmesh.checkpoint.read import read_expert
from expertmesh.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from expertmesh.checkpoint.recipe import ExpertRecipe
    from expertmesh.ids import ExpertId
    from expertmesh.kernels.spec import ExpertSpec, ExpertWeights
    from expertmesh.optimizer import Optimizer

STATE = "optimizer."
_STEP = "step"
"""In a file's metadata."""


class Trained(NamedTuple):
    """What training goes on from."""

    weights: ExpertWeights
    """Float32, on CPU."""
    state: dict[str, dict[str, Tensor]]
    """For each tensor of the weights by name, the optimiser's state; {} for an expert that has not moved yet."""


def file_of(expert: ExpertId) -> str:
    """The file of an expert, in its checkpoint's folder."""
    return f"expert-{expert.layer}-{expert.index}.safetensors"


def tensor_of(expert: ExpertId, name: str) -> str:
    """A tensor of an expert in that file: `name` is a field of `ExpertWeights`."""
    return f"layers.{expert.layer}.experts.{expert.index}.{name}"


def write_trained(folder: Path, expert: ExpertId, step: int, tensors: Mapping[str, Tensor]) -> str:
    """Write an expert's file: its name. `tensors` are weights by name, and `KEY.NAME` of the optimiser's state.

    Raises CheckpointError when the folder takes no file.
    """
    file = file_of(expert)
    named = {STATE + name if "." in name else tensor_of(expert, name): tensor for name, tensor in tensors.items()}
    draft = folder / f".{file}.{os.getpid()}"
    try:
        save_file(named, draft, metadata={_STEP: str(step)})
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(folder / file)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {folder / file}: {one_line(str(error))}") from error
    return file


def read_trained(root: Path, recipe: ExpertRecipe, spec: ExpertSpec, step: int, optimizer: Optimizer) -> Trained:
    """An expert to train, in float32. At step 0 it is any expert of any checkpoint, and the optimiser begins anew.

    Raises CheckpointError when it is not whole, of another step, or another optimiser's.
    """
    weights = read_expert(root, recipe, replace(spec, dtype="float32"))
    if step == 0:
        return Trained(weights, {})
    path = root / recipe.w_in.sources[0].file
    try:
        with safe_open(path, framework="pt") as file:
            saved_at = (file.metadata() or {}).get(_STEP)
            if saved_at != str(step):
                raise CheckpointError(f"{path} is of step {one_line(str(saved_at), 40)}, not {step}")
            state = _read_state(file, spec, optimizer, str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {one_line(str(error))}") from error
    return Trained(weights, state)


def _read_state(file: Any, spec: ExpertSpec, optimizer: Optimizer, path: str) -> dict[str, dict[str, Tensor]]:
    stored = {name for name in file.keys() if name.startswith(STATE)}  # noqa: SIM118 - it is no mapping
    if not stored:
        return {}  # no row has chosen it yet
    wanted = {
        f"{STATE}{key}.{name}": () if key == "step" else shape
        for key in optimizer.state
        for name, shape in spec.shapes.items()
    }
    if stored != wanted.keys():
        raise CheckpointError(f"{path} holds the state of another optimizer than {optimizer.name}: go on with that one")
    state: dict[str, dict[str, Tensor]] = {name: {} for name in spec.shapes}
    for full, shape in wanted.items():
        if tuple(file.get_slice(full).get_shape()) != shape:
            raise CheckpointError(f"tensor {full} of {path} has not the shape {list(shape)}")
        tensor = file.get_tensor(full)
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise CheckpointError(f"tensor {full} of {path} is not of finite float32 numbers")
        key, _, name = full.removeprefix(STATE).partition(".")
        state[name][key] = tensor
    return state
