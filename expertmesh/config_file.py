"""Reading a config file: Ray Serve's own schema, with our config as the arguments of one application.

Apart from `config.py`, because this needs Ray.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from expertmesh.config import MeshConfig, describe, parse_config
from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

IMPORT_PATH = "expertmesh.app:build"
"""What `import_path` says in our config files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFile:
    """A config file: Ray Serve's schema, with one application of ours."""

    serve: dict[str, Any]
    """The whole file, as Serve takes it."""
    app_name: str
    route_prefix: str
    mesh: MeshConfig


def load_config(path: Path) -> ServeFile:
    """Read and check a config file. Raises ConfigError naming the file and the key."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    applications = document.get("applications") if isinstance(document, dict) else None
    listed = applications if isinstance(applications, list) else []
    ours = [app for app in listed if isinstance(app, dict) and app.get("import_path") == IMPORT_PATH]
    if len(ours) != 1:
        raise ConfigError(f"{path}: applications: exactly one must have import_path {IMPORT_PATH}, not {len(ours)}")
    # Serve ignores keys that it does not know, so a typo outside `args` would go unnoticed.
    _refuse_unknown(path, "", document, set(ServeDeploySchema.model_fields))
    _refuse_unknown(path, "applications.", ours[0], set(ServeApplicationSchema.model_fields))
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from error
    mesh = parse_config(ours[0].get("args") or {}, where=f"{path}: applications.args")
    prefix = ours[0].get("route_prefix", "/")
    return ServeFile(serve=document, app_name=ours[0].get("name", "default"), route_prefix=prefix, mesh=mesh)


def _refuse_unknown(path: Path, prefix: str, values: dict[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(f"{path}: {prefix}{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else ""))
