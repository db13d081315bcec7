"""Reading one expert by its recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from expertmesh.checkpoint.read import ExpertReader, read_expert
from expertmesh.checkpoint.recipe import ExpertRecipe, TensorRecipe, TensorSource
from expertmesh.errors import CheckpointError
from expertmesh.kernels.spec import Activation, ExpertSpec

FILE = "model.safetensors"
SPEC = ExpertSpec(hidden=4, intermediate=3, activation=Activation(name="silu"))


def tensor(*names: str, index: int | None = None, transpose: bool = False, deinterleave: bool = False) -> TensorRecipe:
    sources = tuple(TensorSource(file=FILE, name=name, index=index) for name in names)
    return TensorRecipe(sources=sources, transpose=transpose, deinterleave=deinterleave)


SEPARATE = ExpertRecipe(w_in=tensor("gate", "up"), w_out=tensor("down"))


@pytest.fixture
def separate(tmp_path: Path) -> dict[str, torch.Tensor]:
    """An expert stored as three matrices."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (3, 4), "up": (3, 4), "down": (4, 3)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / FILE)
    return tensors


def test_gate_rows_come_before_up_rows(separate: dict[str, torch.Tensor], tmp_path: Path):
    weights = read_expert(tmp_path, SEPARATE, SPEC)
    assert torch.equal(weights.w_in, torch.cat([separate["gate"], separate["up"]]))
    assert torch.equal(weights.w_out, separate["down"])
    assert weights.b_in is None
    assert weights.b_out is None


def test_an_expert_of_rows_below_one_another_is_read(tmp_path: Path):
    tensors = {name: torch.randn(6, 4) for name in ("gate", "up", "down")}
    save_file(tensors, tmp_path / FILE)

    def rows(name: str, index: int) -> TensorSource:
        return TensorSource(file=FILE, name=name, index=index, parts=2)

    for index, part in enumerate((slice(0, 3), slice(3, 6))):
        w_in = TensorRecipe(sources=(rows("gate", index), rows("up", index)))
        recipe = ExpertRecipe(w_in=w_in, w_out=TensorRecipe(sources=(rows("down", index),), transpose=True))
        weights = read_expert(tmp_path, recipe, SPEC)
        assert torch.equal(weights.w_in, torch.cat([tensors["gate"][part], tensors["up"][part]]))
        assert torch.equal(weights.w_out, tensors["down"][part].T)


@pytest.mark.parametrize(("index", "parts"), [(2, 2), (0, 4), (7, 100)])
def test_a_part_that_there_is_not_is_an_error(index: int, parts: int, tmp_path: Path):
    save_file({"rows": torch.randn(6, 4)}, tmp_path / FILE)
    tensor_of = TensorRecipe(sources=(TensorSource(file=FILE, name="rows", index=index, parts=parts),))
    with pytest.raises(CheckpointError, match=r"cannot read tensor rows.*its shape is \[6, 4\]"):
        read_expert(tmp_path, ExpertRecipe(w_in=tensor_of, w_out=tensor_of), SPEC)


def test_an_expert_of_a_transposed_interleaved_biased_stack_is_read(tmp_path: Path):
    w_in, w_out = torch.randn(6, 4), torch.randn(4, 3)
    b_in, b_out = torch.randn(6), torch.randn(4)
    stored = {"gate_up": w_in.T, "down": w_out.T, "gate_up_bias": b_in, "down_bias": b_out}
    save_file({name: torch.stack([t + 1, t]).contiguous() for name, t in stored.items()}, tmp_path / FILE)
    recipe = ExpertRecipe(
        w_in=tensor("gate_up", index=1, transpose=True, deinterleave=True),
        w_out=tensor("down", index=1, transpose=True),
        b_in=tensor("gate_up_bias", index=1, deinterleave=True),
        b_out=tensor("down_bias", index=1),
    )
    weights = read_expert(tmp_path, recipe, replace(SPEC, bias=True))
    order = [0, 2, 4, 1, 3, 5]
    assert weights.b_in is not None
    assert weights.b_out is not None
    assert torch.equal(weights.w_in, w_in[order])
    assert torch.equal(weights.w_out, w_out)
    assert torch.equal(weights.b_in, b_in[order])
    assert torch.equal(weights.b_out, b_out)
    assert all(t is not None and t.is_contiguous() for t in weights[:4])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_cast_to_the_dtype_of_the_slot(dtype: str, separate: dict[str, torch.Tensor], tmp_path: Path):
    weights = read_expert(tmp_path, SEPARATE, replace(SPEC, dtype=dtype))
    assert torch.equal(weights.w_out, separate["down"].to(getattr(torch, dtype)))
    assert weights.w_in.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused(number: float, separate: dict[str, torch.Tensor], tmp_path: Path):
    separate["up"][1, 2] = number
    save_file(separate, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"tensor up of .*model\.safetensors holds a NaN or an infinity"):
        read_expert(tmp_path, SEPARATE, SPEC)


def test_a_number_too_large_for_the_dtype_is_refused(separate: dict[str, torch.Tensor], tmp_path: Path):
    separate["down"][0, 0] = 1e6
    save_file(separate, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"tensor down of .* does not fit in torch\.float16"):
        read_expert(tmp_path, SEPARATE, replace(SPEC, dtype="float16"))


def test_a_tensor_of_another_shape_is_refused(separate: dict[str, torch.Tensor], tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"tensor gate of .* makes a tensor of shape \(6, 4\), not \(4, 4\)"):
        read_expert(tmp_path, SEPARATE, replace(SPEC, intermediate=2))


def test_a_quantized_tensor_is_refused(separate: dict[str, torch.Tensor], tmp_path: Path):
    separate["gate"] = separate["gate"].to(torch.float8_e4m3fn)
    save_file(separate, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"tensor gate of .* is stored as torch\.float8_e4m3fn"):
        read_expert(tmp_path, SEPARATE, SPEC)


def test_a_missing_tensor_is_named(tmp_path: Path):
    save_file({"gate": torch.ones(3, 4)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"cannot read tensor up of .*model\.safetensors"):
        read_expert(tmp_path, SEPARATE, SPEC)


def test_an_expert_outside_the_stack_is_named(tmp_path: Path):
    save_file({"gate_up": torch.ones(2, 6, 4), "down": torch.ones(2, 4, 3)}, tmp_path / FILE)
    recipe = ExpertRecipe(w_in=tensor("gate_up", index=2), w_out=tensor("down", index=2))
    with pytest.raises(CheckpointError, match=r"cannot read tensor gate_up\[2\]|cannot read tensor down\[2\]"):
        read_expert(tmp_path, recipe, SPEC)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"cannot read tensor gate of .*model\.safetensors"):
        read_expert(tmp_path, SEPARATE, SPEC)


def test_a_reader_reads_again_after_it_was_closed(separate: dict[str, torch.Tensor], tmp_path: Path):
    with ExpertReader(tmp_path) as reader:
        first = reader.read(SEPARATE, SPEC)
        reader.close()
        assert torch.equal(reader.read(SEPARATE, SPEC).w_in, first.w_in)


def test_reading_one_expert_of_a_stack_takes_the_memory_of_one(tmp_path: Path):
    """The file is 1 GiB of holes, so it takes no disk; what is mapped and touched counts as the process's memory."""
    shape, num_bytes = [256, 1024, 1024], 2**30
    header = json.dumps({"gate_up": {"dtype": "F32", "shape": shape, "data_offsets": [0, num_bytes]}}).encode()
    with (tmp_path / FILE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_bytes)
    both = tensor("gate_up", index=200)
    spec = ExpertSpec(hidden=1024, intermediate=1024, gated=False, activation=Activation(name="silu"))
    process = psutil.Process()
    before = process.memory_info().rss
    with ExpertReader(tmp_path) as reader:
        weights = reader.read(ExpertRecipe(w_in=both, w_out=both), spec)
        grown = process.memory_info().rss - before
    assert weights.w_in.shape == (1024, 1024)
    assert grown < 64 * 2**20
