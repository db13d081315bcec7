"""MoE layers on their own, as a folder: for models that are not language models. Which experts, and where they are.

    config.json                   a `LayerConfig`
    *.safetensors                 `layers.L.experts.E.w_in`, `.w_out`, and with a bias `.b_in`, `.b_out`, laid out as
                                  kernels/spec.py says: in `model.safetensors`, or in files of any names with
    model.safetensors.index.json  as ever: the file of each tensor

Gates are not in it: they belong to the model that calls the layers. Needs no transformers. Invariant: an index made
here has a recipe for every expert, and each makes tensors of the shapes that the config says.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator

from expertmesh.checkpoint.recipe import CheckpointIndex, ExpertRecipe, TensorRecipe, TensorSource
from expertmesh.checkpoint.source import stored_tensors
from expertmesh.checkpoint.trained import file_of, tensor_of, write_trained
from expertmesh.config import Section, describe
from expertmesh.errors import CheckpointError, ConfigError, check_known
from expertmesh.ids import MAX_EXPERTS, MAX_LAYERS, ExpertId
from expertmesh.kernels.activation import ACTIVATIONS, POINTWISE
from expertmesh.kernels.spec import Activation, ExpertSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL_TYPE: Literal["expertmesh_moe_layer"] = "expertmesh_moe_layer"
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_MAX_WIDTH = 2**20


class LayerConfig(Section):
    """What `config.json` of such a folder says. Experts of all its layers have one shape."""

    model_type: Literal["expertmesh_moe_layer"] = MODEL_TYPE
    hidden: int = Field(ge=1, le=_MAX_WIDTH)
    """Width of a row, in and out."""
    intermediate: int = Field(ge=1, le=_MAX_WIDTH)
    num_experts: int = Field(ge=1, le=MAX_EXPERTS)
    """Of each layer."""
    num_layers: int = Field(default=1, ge=1, le=MAX_LAYERS)
    gated: bool = True
    bias: bool = False
    activation: str = "silu"
    """One of `kernels.activation.ACTIVATIONS`; with `limit` and `alpha`, where it has them."""
    limit: float = 0.0
    alpha: float = 1.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of rows, and of the weights where they are computed with. Files may have any."""
    step: int = Field(default=0, ge=0)
    """How many steps of training the weights have behind them; above 0, the files hold an optimiser's state too."""

    @model_validator(mode="after")
    def _activation_is_known(self) -> Self:
        try:
            check_known("activation", self.activation, sorted(ACTIVATIONS if self.gated else POINTWISE))
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def spec(self) -> ExpertSpec:
        """Of every expert."""
        return ExpertSpec(
            hidden=self.hidden,
            intermediate=self.intermediate,
            gated=self.gated,
            bias=self.bias,
            activation=Activation(name=self.activation, limit=self.limit, alpha=self.alpha),
            dtype=self.dtype,
        )

    @property
    def experts(self) -> Iterator[ExpertId]:
        """All of them, layer by layer."""
        return (ExpertId(layer, index) for layer in range(self.num_layers) for index in range(self.num_experts))


def layer_config(**fields: object) -> LayerConfig:
    """A config of these fields. Raises ConfigError naming the one that cannot be."""
    try:
        return LayerConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"layer: {describe(error)}") from error


def is_layer_folder(folder: Path) -> bool:
    """Whether a checkpoint's folder is one of these."""
    try:
        return bool(json.loads((folder / _CONFIG).read_text())["model_type"] == MODEL_TYPE)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read_config(folder: Path) -> LayerConfig:
    """Raises CheckpointError naming the key that is wrong, or the file that is missing."""
    path = folder / _CONFIG
    try:
        return LayerConfig.model_validate(json.loads(path.read_text()))
    except ValidationError as error:
        raise CheckpointError(f"{path}: {describe(error)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} is no folder of an MoE layer: cannot read {path.name} ({error})") from error


def index_layers(folder: Path, dtype: str | None = None) -> CheckpointIndex:
    """The recipes of all experts of a folder. `dtype` None takes the config's. Raises CheckpointError."""
    config = read_config(folder)
    spec = config.spec if dtype is None else config.model_copy(update={"dtype": dtype}).spec
    stored = stored_tensors(folder)

    def recipe(expert: ExpertId, name: str) -> TensorRecipe:
        full = tensor_of(expert, name)
        if full not in stored:
            raise CheckpointError(f"{folder} has no tensor {full}")
        if stored[full].shape != spec.shapes[name]:
            shapes = f"shape {list(stored[full].shape)}, and the config wants {list(spec.shapes[name])}"
            raise CheckpointError(f"tensor {full} of {folder / stored[full].file} has {shapes}")
        return TensorRecipe(sources=(TensorSource(file=stored[full].file, name=full),))

    recipes = {
        expert: ExpertRecipe(**{name: recipe(expert, name) for name in spec.shapes}) for expert in config.experts
    }
    layers = config.num_layers
    return CheckpointIndex(
        root=str(folder), specs=(spec,) * layers, num_experts=(config.num_experts,) * layers, recipes=recipes
    )


def new_folder(folder: Path, config: LayerConfig, seed: int = 0) -> None:
    """Write untrained experts: each weight uniform within one over the square root of its inputs, as torch's Linear.

    Raises ConfigError when there is a checkpoint already.
    """
    prepare_folder(folder)
    generator = torch.Generator().manual_seed(seed)
    inputs = {"w_in": config.hidden, "b_in": config.hidden, "w_out": config.intermediate, "b_out": config.intermediate}
    for expert in config.experts:
        tensors = {
            name: (torch.rand(shape, generator=generator) * 2 - 1) / inputs[name] ** 0.5
            for name, shape in config.spec.shapes.items()
        }
        write_trained(folder, expert, config.step, tensors)
    complete_folder(folder, config)


def prepare_folder(folder: Path) -> None:
    """Make a folder for a checkpoint. Raises ConfigError when it holds one, for that is never written over."""
    if (folder / _CONFIG).exists():
        raise ConfigError(f"folder: {folder} holds a checkpoint already; name another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder: cannot make {folder}: {error.strerror}") from error


def complete_folder(folder: Path, config: LayerConfig) -> None:
    """Make the files of all experts in a folder a checkpoint. The config comes last: without it, it is none."""
    places = {tensor_of(expert, name): file_of(expert) for expert in config.experts for name in config.spec.shapes}
    _write_json(folder / _INDEX, {"weight_map": places})
    _write_json(folder / _CONFIG, config.model_dump(mode="json"))


def _write_json(path: Path, value: object) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
