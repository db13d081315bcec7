"""Files that a user names, as domains: what kind of text each is, and the text.

Knows nothing of tokens. Invariant: a domain that `read_domains` returns has text in it, and no two have one name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmesh.errors import ConfigError, one_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A kind of text."""

    name: str
    documents: tuple[str, ...]
    """One for each file. None is empty."""


def read_domains(paths: Sequence[Path]) -> tuple[Domain, ...]:
    """One domain for each path: a file, named like it without its ending, or a folder with the files right in it.

    Raises ConfigError, naming the file, for one that is missing, empty or not UTF-8, and for two of one name.
    """
    domains: dict[str, Domain] = {}
    for path in paths:
        files = _files_of(path) if path.is_dir() else [path]
        name = one_line(path.resolve().name if path.is_dir() else path.stem, 60)
        if name in domains:
            raise ConfigError(f"--text: two domains are named {name!r}: rename {path}, or put both in one folder")
        domains[name] = Domain(name=name, documents=tuple(_read(file) for file in files))
    return tuple(domains.values())


def _files_of(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    if not files:
        raise ConfigError(f"--text: {folder} holds no files: give files, or a folder that they are right in")
    return files


def _read(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise ConfigError(f"--text: {file} is not UTF-8 ({found}): convert it, as with iconv -t utf-8") from error
    except FileNotFoundError as error:
        raise ConfigError(f"--text: there is no file {file}") from error
    except OSError as error:
        raise ConfigError(f"--text: cannot read {file}: {error.strerror}") from error
    if not text.strip():
        raise ConfigError(f"--text: {file} is empty: give a file with text in it")
    return text
