"""Checkpoints on disk: from the name that a user types to a folder known to be whole, and what its files hold.

Reads headers only, never tensor data. Knows nothing of architectures and needs neither torch nor transformers: hosts
import it. Invariant: a folder that `resolve` returns has a config and every shard it names, each as long as its own
header says.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmesh.errors import CheckpointError

TINY = "tiny"
"""The name of the model that ships with the package."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own limit
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_HUB_SKIPS = ["*/*", "consolidated*"]  # copies of the weights in their authors' own layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint, as its file's header describes it."""

    file: str
    """Relative to the checkpoint folder."""
    dtype: str
    """In safetensors' words: F32, BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]


def resolve(model: str) -> Path:
    """The folder of a model given as a local folder, a hub id or "tiny", downloading it if need be.

    Raises CheckpointError if there is none of that name, or if what is there cannot be loaded whole. Honours
    HF_HUB_OFFLINE, HF_HOME and HF_TOKEN as huggingface_hub does.
    """
    if model == TINY:
        from expertmesh.models import tiny_path

        folder = tiny_path()
    elif Path(model).expanduser().is_dir():
        folder = Path(model).expanduser().resolve()
    else:
        folder = _download(model)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")
    stored_tensors(folder)
    return folder


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, by name, from the headers of its safetensors files.

    Raises CheckpointError, naming the file, if a shard is missing, cut short or corrupt.
    """
    tensors: dict[str, StoredTensor] = {}
    placed = _placed_tensors(folder)
    files = sorted(set(placed.values())) if placed is not None else [_SINGLE]
    for file in files:
        tensors.update(_read_header(folder, file))
    for name, file in (placed or {}).items():
        if name not in tensors:
            raise CheckpointError(f"{folder / file} has no tensor {name!r}, though {_INDEX} says so")
    return tensors


def _placed_tensors(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to shard; None for a checkpoint in one file. Every file named exists."""
    index = folder / _INDEX
    if index.is_file():
        try:
            placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is not a valid weight index: {error!r}") from error
        missing = sorted({file for file in placed.values() if not (folder / file).is_file()})
        if missing:
            raise CheckpointError(f"{folder} is incomplete: {missing[0]} is missing ({len(missing)} shards in all)")
        return placed
    if (folder / _SINGLE).is_file():
        return None
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} holds only pickled weights (.bin or .pt), which are never loaded: save it as safetensors first"
        )
    raise CheckpointError(f"{folder} holds no weights: expected {_SINGLE}, or shards with {_INDEX}")


def _read_header(folder: Path, file: str) -> dict[str, StoredTensor]:
    """Layout: 8 bytes of header length, little-endian; the header, JSON; the data, up to the last tensor's end."""
    path = folder / file
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path} is cut short or no safetensors file: its header does not fit in it")
        try:
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            tensors = {
                name: StoredTensor(file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]))
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{path} is corrupt: its header cannot be read ({error!r})") from error
    expected = 8 + length + end
    if size < expected:
        raise CheckpointError(f"{path} is cut short: {size} of {expected} bytes; download it again")
    return tensors


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if model.startswith((".", "~", os.sep)) or model.count("/") > 1:
        raise CheckpointError(_unknown(model, "there is no such folder"))
    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIPS))
    except (HFValidationError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(_unknown(model, reason[0] if reason else type(error).__name__)) from error


def _unknown(model: str, reason: str) -> str:
    path = Path(model).expanduser()
    siblings = [child.name for child in path.parent.iterdir() if child.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {path.parent / close[0]}?" if close else ""
    return f'no model {model!r}: give a checkpoint folder, a hub id (owner/name) or "{TINY}" ({reason}){hint}'
