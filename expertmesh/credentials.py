"""The mesh's shared token: who knows it may order hosts, send them rows, and scale the mesh.

Owns where the token is kept; knows nothing of who asks for it or how it travels. Invariant: all processes of one user
on one machine get the same token, even those that ask for the first time at the same moment.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from expertmesh.errors import ConfigError

TOKEN_VARIABLE = "EXPERTMESH_TOKEN"
"""The environment variable that carries the token to processes, out of sight of `ps`. It goes before the file."""


def token_file() -> Path:
    """Where this user's token is kept, whether or not there is one yet."""
    return Path("~/.expertmesh/token").expanduser()


def shared_token(*, make: bool = False) -> str:
    """The environment's token, else that of `token_file`; with `make`, one is drawn and kept there if there is none.

    Raises ConfigError when there is none, or when others can read the file.
    """
    if given := os.environ.get(TOKEN_VARIABLE):
        return _checked(given, TOKEN_VARIABLE)
    path = token_file()
    try:
        if make:
            _make(path)
        return _read(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"token: there is none here; set {TOKEN_VARIABLE} as where the mesh was started, or copy {path} from there"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"token: {error.filename or path}: {error.strerror}; mend that, or set {TOKEN_VARIABLE}"
        ) from error


def _make(path: Path) -> None:
    """Draw a token, unless there is one: whole or not at all, so that who comes second reads what the first wrote."""
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(draft)
    finally:
        draft.unlink()


def _read(path: Path) -> str:
    with path.open(encoding="ascii", errors="replace") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise ConfigError(
                f"token: others can read {path}; if nobody did, `chmod 600` it, else delete it and start the mesh anew"
            )
        return _checked(file.read().strip(), str(path))


def _checked(token: str, source: str) -> str:
    """The token, if it can travel in a header."""
    if not token or not all("!" <= character <= "~" for character in token):
        raise ConfigError(f"token: {source} must hold printable ASCII without spaces, and something")
    return token
