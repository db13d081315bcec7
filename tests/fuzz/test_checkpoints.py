"""Whatever the files of a checkpoint hold, they are read or refused, and allocate what their own bytes say."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from expertmesh.checkpoint.index import index_checkpoint
from expertmesh.checkpoint.read import read_expert
from expertmesh.checkpoint.recipe import ExpertRecipe, TensorRecipe, TensorSource
from expertmesh.checkpoint.source import resolve, stored_tensors
from expertmesh.errors import CheckpointError
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.testing.experts import SILU
from tests.architectures.checkpoints import save_checkpoint
from tests.fuzz.fuzzing import altered, at_most, damaged, edges, fuzzed, outcome, texts, values

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SPEC = ExpertSpec(hidden=4, intermediate=6, activation=SILU)
TENSORS = {
    "gate": torch.ones(6, 4), "up": torch.ones(6, 4), "down": torch.ones(4, 6), "stack": torch.ones(3, 4, 6),
    "scalar": torch.ones(()), "empty": torch.ones(0, 4), "wide": torch.ones(2, 4, dtype=torch.bfloat16),
}  # fmt: skip
WHOLE = save(TENSORS)
HEADER: dict[str, Any] = json.loads(WHOLE[8 : 8 + int.from_bytes(WHOLE[:8], "little")])
ROOM = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text("{}")
    return folder


def with_header(header: Any, length: int | None = None) -> bytes:
    """The file with another header, which may be said to be of another length."""
    text = json.dumps(header).encode()
    data = WHOLE[8 + int.from_bytes(WHOLE[:8], "little") :]
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def expect_read(folder: Path, data: bytes) -> None:
    """What passes as a checkpoint has tensors that the file really holds."""
    (folder / INDEX).unlink(missing_ok=True)
    (folder / FILE).write_bytes(data)
    with at_most(ROOM + 100 * len(data)):
        tensors = outcome(lambda: stored_tensors(folder), CheckpointError)
    if isinstance(tensors, CheckpointError):
        return
    for tensor in tensors.values():
        count = 1
        for size in tensor.shape:
            assert type(size) is int
            assert size >= 0
            count *= size
        assert count <= 8 * len(data)
    for name in tensors:
        source = TensorSource(file=FILE, name=name, index=None)
        recipe = TensorRecipe(sources=(source,))
        outcome(
            lambda recipe=recipe: read_expert(folder, ExpertRecipe(w_in=recipe, w_out=recipe), SPEC), CheckpointError
        )


@fuzzed(200)
@given(altered(HEADER))
def test_any_header_is_of_this_file_or_refused(folder, header) -> None:
    expect_read(folder, with_header(header))


@fuzzed(150)
@given(damaged(WHOLE))
@example(WHOLE[:4])
@example(b"")
@example(struct.pack("<Q", 2**63) + b"{}")
@example(struct.pack("<Q", 60_000) + b"[" * 60_000)
@example(struct.pack("<Q", 2) + b"{}")
@example(struct.pack("<Q", 2) + b"[]")
def test_a_damaged_file_is_read_or_refused(folder, data) -> None:
    expect_read(folder, data)


def entry(shape: list[object], offsets: list[object], dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "beyond the end": {"a": entry([2**40], [0, 2**42])},
    "more elements than bytes": {"a": entry([2**40], [0, 4])},
    "none of very many": {"a": entry([2**62, 0], [0, 0])},
    "overflowing": {"a": entry([2**32, 2**32], [0, 0])},
    "overlapping": {"a": entry([2], [0, 8]), "b": entry([2], [4, 12])},
    "backwards": {"a": entry([1], [4, 0])},
    "negative": {"a": entry([-1], [0, -4])},
    "a text for a shape": {"a": entry("abc", [0, 4])},  # type: ignore[arg-type]
    "a text for an offset": {"a": entry([1], [0, "4"])},
    "nothing for an offset": {"a": entry([1], [0, None])},
    "an infinite offset": {"a": entry([1], [0, float("inf")])},
    "an unknown type": {"a": entry([1], [0, 4], "Q3")},
    "a list for a type": {"a": entry([1], [0, 4], ["F32"])},
    "a hole": {"a": entry([1], [4, 8])},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(folder, lie) -> None:
    (folder / INDEX).unlink(missing_ok=True)
    header = json.dumps(LIES[lie]).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    with at_most(ROOM), pytest.raises(CheckpointError):
        stored_tensors(folder)


@fuzzed(120)
@given(altered({"metadata": {}, "weight_map": dict.fromkeys(TENSORS, FILE)}) | values)
@example({"weight_map": {"gate": "../secret.safetensors"}})
@example({"weight_map": {"gate": "/etc/passwd"}})
@example({"weight_map": {"gate": "sub/../../secret.safetensors"}})
@example({"weight_map": [["gate", FILE]]})
def test_any_index_is_of_this_folder_or_refused(folder, index) -> None:
    (folder.parent / "secret.safetensors").write_bytes(WHOLE)
    (folder / FILE).write_bytes(WHOLE)
    (folder / INDEX).write_text(json.dumps(index))
    with at_most(ROOM):
        tensors = outcome(lambda: stored_tensors(folder), CheckpointError)
    if not isinstance(tensors, CheckpointError):
        assert {tensor.file for tensor in tensors.values()} <= {FILE}


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 50_000, b"{", b"null", b"5"])
def test_an_index_that_is_none_is_refused(folder, data) -> None:
    (folder / INDEX).write_bytes(data)
    with pytest.raises(CheckpointError):
        stored_tensors(folder)
    (folder / INDEX).unlink()


sources = st.builds(
    TensorSource,
    file=st.sampled_from([FILE, FILE, "", "nothing.safetensors", "config.json"]),
    name=st.sampled_from([*TENSORS, ""]) | texts,
    index=st.none() | edges(2**32 - 1),
    parts=st.none() | edges(2**32 - 1).filter(bool),
)
tensor_recipes = st.builds(
    TensorRecipe,
    sources=st.lists(sources, min_size=1, max_size=3).map(tuple),
    transpose=st.booleans(),
    deinterleave=st.booleans(),
)


@fuzzed(200)
@given(
    tensor_recipes,
    tensor_recipes,
    st.sampled_from([(None, None), ("w_in", None), ("w_in", "w_out")]),
    st.booleans(),
    st.integers(1, 12),
)
def test_any_recipe_makes_what_the_slot_takes_or_is_refused(
    folder, w_in, w_out, biases, has_bias, intermediate
) -> None:
    (folder / INDEX).unlink(missing_ok=True)
    (folder / FILE).write_bytes(WHOLE)
    spec = ExpertSpec(hidden=4, intermediate=intermediate, bias=has_bias, gated=False, activation=SILU)
    b_in, b_out = (w_in if name else None for name in biases)
    recipe = ExpertRecipe(w_in=w_in, w_out=w_out, b_in=b_in, b_out=b_out)
    weights = outcome(lambda: read_expert(folder, recipe, spec), CheckpointError)
    if not isinstance(weights, CheckpointError):
        weights.check(spec)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    save_checkpoint(folder, "mixtral")
    return folder


@fuzzed(20)
@given(st.data())
def test_any_config_of_a_checkpoint_is_indexed_or_refused(mixtral, data) -> None:
    path = mixtral / "config.json"
    whole = path.with_suffix(".whole")
    if not whole.exists():
        shutil.copy(path, whole)
    config = json.loads(whole.read_text())
    path.write_text(json.dumps(data.draw(altered(config))))
    try:
        index = outcome(lambda: index_checkpoint(resolve(str(mixtral))), CheckpointError)
    finally:
        shutil.copy(whole, path)
    if not isinstance(index, CheckpointError):
        assert len(index.specs) == len(index.num_experts)


@fuzzed(150)
@given(st.text(max_size=300) | texts | st.sampled_from(["a/b/c", "~nobody-here", "x" * 300, "a/" + "x" * 300, ".", ""]))
def test_any_name_is_a_checkpoint_or_none(name) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        outcome(lambda: resolve(name), CheckpointError)


ADDRESS_SPACE = """
import json, resource, struct, sys
from pathlib import Path
import torch
from expertmesh.checkpoint.read import read_expert
from expertmesh.checkpoint.recipe import ExpertRecipe, TensorRecipe, TensorSource
from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.hosts.configuration import HostConfiguration
from expertmesh.hosts.host import Host
from expertmesh.kernels.spec import Activation, ExpertSpec
folder = Path(sys.argv[1])
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
spec = ExpertSpec(hidden=4, intermediate=6, activation=Activation(name="silu"))
large = TensorSource(file="large.safetensors", name="large")
for sources in ([large], [large] * 100_000):
    recipe = TensorRecipe(sources=tuple(sources))
    try:
        read_expert(folder, ExpertRecipe(w_in=recipe, w_out=recipe), spec)
    except CheckpointError:
        print("refused")
host = Host(2**20)
for hidden, intermediate in ((2**20, 2**20), (2**32 - 1, 2**32 - 1)):
    huge = ExpertSpec(hidden=hidden, intermediate=intermediate, activation=Activation(name="silu"))
    try:
        host.configure(HostConfiguration(checkpoint="", specs=(huge,), layer_specs=(0,), layer_experts=(1,)))
    except ConfigError:
        print("refused")
"""


def test_sizes_that_others_name_are_checked_before_memory_is_taken(tmp_path) -> None:
    """In a process that may take 256 MiB more: torch's memory is not seen from Python."""
    (tmp_path / "large.safetensors").write_bytes(save({"large": torch.ones(2**23)}))
    run = [sys.executable, "-c", ADDRESS_SPACE, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["refused"] * 4, done.stderr[-2000:]
