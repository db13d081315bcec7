"""Finding a checkpoint, and refusing one that is not whole."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from expertmesh.checkpoint.source import StoredTensor, resolve, stored_tensors
from expertmesh.errors import CheckpointError

SHARDS = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": SHARDS}))
    save_file({"a.weight": torch.ones(4, 3)}, tmp_path / SHARDS["a.weight"])
    save_file({"b.weight": torch.ones(5, dtype=torch.bfloat16)}, tmp_path / SHARDS["b.weight"])
    return tmp_path


def test_a_local_folder_is_its_own_checkpoint(folder: Path):
    assert resolve(str(folder)) == folder


def test_tensors_are_described_by_their_headers(folder: Path):
    assert stored_tensors(folder) == {
        "a.weight": StoredTensor(file=SHARDS["a.weight"], dtype="F32", shape=(4, 3)),
        "b.weight": StoredTensor(file=SHARDS["b.weight"], dtype="BF16", shape=(5,)),
    }


def test_one_unsharded_file_is_a_checkpoint(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert resolve(str(tmp_path)) == tmp_path
    assert list(stored_tensors(tmp_path)) == ["a.weight"]


def test_tiny_is_the_model_that_ships_with_the_package():
    assert (resolve("tiny") / "config.json").is_file()


def test_a_missing_shard_is_named(folder: Path):
    (folder / SHARDS["b.weight"]).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        resolve(str(folder))


def test_a_truncated_shard_is_named(folder: Path):
    shard = folder / SHARDS["a.weight"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors is cut short: \d+ of \d+ bytes"):
        resolve(str(folder))


def test_a_shard_cut_within_its_header_is_named(folder: Path):
    shard = folder / SHARDS["a.weight"]
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is cut short"):
        resolve(str(folder))


def test_a_file_that_is_no_safetensors_is_named(folder: Path):
    (folder / SHARDS["a.weight"]).write_bytes((5).to_bytes(8, "little") + b"hello")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is corrupt"):
        resolve(str(folder))


def test_a_tensor_that_is_in_no_shard_is_named(folder: Path):
    save_file({"other": torch.ones(1)}, folder / SHARDS["a.weight"])
    with pytest.raises(CheckpointError, match=r"has no tensor 'a\.weight'"):
        resolve(str(folder))


def test_a_broken_index_is_named(folder: Path):
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is not a valid weight index"):
        resolve(str(folder))


def test_a_folder_without_a_config_is_no_checkpoint(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolve(str(folder))


def test_pickled_weights_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only pickled weights .*safetensors first"):
        resolve(str(tmp_path))


def test_a_folder_without_weights_says_what_is_expected(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no weights: expected model\.safetensors"):
        resolve(str(tmp_path))


def test_a_mistyped_folder_names_the_nearest(folder: Path):
    (folder / "olmoe-7b").mkdir()
    with pytest.raises(CheckpointError, match=r"no such folder.*did you mean .*olmoe-7b\?"):
        resolve(str(folder / "olmoe7b"))


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "not a name!"])
def test_an_unknown_name_says_what_a_model_can_be(name: str, offline_hub: Path):
    with pytest.raises(CheckpointError, match=rf'no model {name!r}: .* folder, a hub id \(owner/name\) or "tiny"'):
        resolve(name)


def test_a_hub_id_is_found_in_the_cache_without_network(offline_hub: Path):
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = offline_hub / "models--owner--name"
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    (snapshot / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(2)}, snapshot / "model.safetensors")
    assert resolve("owner/name") == snapshot
