"""Checkpoints on disk: from the name that a user types to a folder known to be whole, and what its files hold.

Reads headers only, never tensor data. Knows nothing of architectures and needs neither torch nor transformers: hosts
import it. Invariant: a folder that `resolve` returns has a config and every shard it names, each as long as its own
header says.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from expertmesh.errors import CheckpointError, one_line

TINY = "tiny"
"""The name of the model that ships with the package."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own limit
_UNREADABLE = (
    SafetensorError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
)
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
    elif os.path.isdir(named := _expanded(model)):  # of names that no system takes, too, it says False
        folder = Path(named).resolve()
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


def is_within(file: str) -> bool:
    """Whether `file` is the path of something inside of whatever folder it is joined to."""
    return file.isprintable() and not PurePosixPath(file).is_absolute() and ".." not in PurePosixPath(file).parts


def _placed_tensors(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to shard; None for a checkpoint in one file. Every file named exists."""
    index = folder / _INDEX
    if index.is_file():
        try:
            placed: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index} is not a valid weight index: {error!r}") from error
        for file in placed.values():
            if not isinstance(file, str) or not is_within(file):
                raise CheckpointError(f"{index} names {file!r}, which is no file inside of the folder")
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
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is cut short or no safetensors file: its header does not fit in it")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        if size < expected:
            raise CheckpointError(f"{path} is cut short: {size} of {expected} bytes; download it again")
        with safe_open(path, framework="np"):  # checks that types, shapes and offsets agree, and fill the file
            pass
        return {
            name: StoredTensor(file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]))
            for name, entry in header.items()
        }
    except _UNREADABLE as error:
        cause = f"{type(error).__name__}: {one_line(str(error))}"
        raise CheckpointError(f"{path} is corrupt: its header cannot be read ({cause})") from error


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if model.startswith((".", "~", os.sep)) or model.count("/") > 1:
        raise CheckpointError(_unknown(model, "there is no such folder"))
    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIPS))
    except (HFValidationError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(_unknown(model, one_line(reason[0]) if reason else type(error).__name__)) from error


def _expanded(model: str) -> str:
    try:
        return os.path.expanduser(model)
    except ValueError:  # a name that no system takes
        return model


def _unknown(model: str, reason: str) -> str:
    path = Path(_expanded(model))
    siblings = []
    with contextlib.suppress(OSError, ValueError):
        siblings = [child.name for child in path.parent.iterdir() if child.is_dir()]
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {path.parent / close[0]}?" if close else ""
    return f'no model {model!r}: give a checkpoint folder, a hub id (owner/name) or "{TINY}" ({reason}){hint}'
