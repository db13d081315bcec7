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
from expertmesh.errors import ConfigError, one_line

if TYPE_CHECKING:
    from pathlib import Path

_MAX_BYTES, _MAX_DEPTH = 2**20, 64
_BEGINS = (
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
)
_ENDS = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)

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
    document = _read(path)
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
    if prefix is None:  # what Serve takes for an application that only others call
        raise ConfigError(f"{path}: applications.route_prefix: the gateway needs one, such as /")
    return ServeFile(serve=document, app_name=ours[0].get("name", "default"), route_prefix=prefix, mesh=mesh)


def _read(path: Path) -> Any:
    """The YAML in a file. Aliases are refused: a few lines of them can stand for more than memory holds.
    So is depth, in which the library's time is quadratic."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"{path}: it is longer than {_MAX_BYTES:,} bytes")
        text = data.decode()
        depth = 0
        for token in yaml.scan(text, yaml.SafeLoader):
            depth += isinstance(token, _BEGINS) - isinstance(token, _ENDS)
            if depth > _MAX_DEPTH:
                raise ConfigError(f"{path}: line {token.start_mark.line + 1}: nested too deeply")
            if isinstance(token, yaml.AliasToken):
                line = token.start_mark.line + 1
                raise ConfigError(f"{path}: line {line}: *{one_line(token.value)}: aliases are not read; write it out")
        return yaml.safe_load(text)
    except ConfigError:
        raise
    except Exception as error:  # the library lets out whatever its own code raises for a scalar it cannot convert
        raise ConfigError(f"{path}: {one_line(str(error)) or type(error).__name__}") from error


def _refuse_unknown(path: Path, prefix: str, values: dict[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"{path}: {prefix}{one_line(str(key))}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
            )
