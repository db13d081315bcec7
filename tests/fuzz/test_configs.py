"""Whatever a config file or a plan's input holds, it is used, or refused in one line and with exit code 2."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from expertmesh.cli import main
from expertmesh.config import MeshConfig, parse_config
from expertmesh.config_file import ServeFile, load_config
from expertmesh.errors import ConfigError
from tests.fuzz.fuzzing import altered, at_most, damaged, edges, fuzzed, numbers, outcome, places, values

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
FULL = json.loads(MeshConfig(pools=({"name": "a", "hosts": 3, "labels": {"a": "b"}},)).model_dump_json())  # type: ignore[arg-type]


def assert_usable(config: object) -> None:
    """What is valid must be so for good: it goes to other processes, and everything in it is finite."""
    assert isinstance(config, MeshConfig)
    assert MeshConfig.model_validate(config.model_dump(mode="json")) == config
    assert len(config.name) > 0
    assert config.places >= 1


@fuzzed(400)
@given(altered(FULL))
def test_an_altered_config_is_valid_or_refused(value) -> None:
    config = outcome(lambda: parse_config(value), ConfigError)
    if not isinstance(config, ConfigError):
        assert_usable(config)


@pytest.mark.parametrize("path", [path for path in places(FULL) if path], ids=lambda path: ".".join(map(str, path)))
@fuzzed(6)
@given(value=values | numbers)
def test_any_value_at_any_key_is_valid_or_refused(path, value) -> None:
    config = json.loads(json.dumps(FULL))
    holder = config
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    parsed = outcome(lambda: parse_config(config), ConfigError)
    if not isinstance(parsed, ConfigError):
        assert_usable(parsed)


def load(folder: Path, data: bytes) -> ServeFile | ConfigError:
    path = folder / "config.yaml"
    path.write_bytes(data)
    with at_most(2**23 + 2000 * len(data)):
        file = outcome(lambda: load_config(path), ConfigError)
    if not isinstance(file, ConfigError):
        assert_usable(file.mesh)
        assert file.route_prefix.startswith("/")
        assert file.app_name
        json.dumps(file.serve, default=str)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("configs")


@fuzzed(40)
@given(st.sampled_from(FILES).flatmap(lambda path: altered(yaml.safe_load(path.read_text()))))
def test_an_altered_config_file_is_valid_or_refused(folder, document) -> None:
    load(folder, yaml.safe_dump(json.loads(json.dumps(document))).encode())


@fuzzed(50)
@given(st.sampled_from(FILES).flatmap(lambda path: damaged(path.read_bytes())))
@example(b"applications: &a [*a]")
@example(b"a: 2001-99-99")
@example(b"a: " + b"9" * 5000)
@example(b"a: !!int ''")
@example(b"a: !!timestamp x")
@example(b"a: !!bool maybe")
@example(b"a: !!python/object/apply:os.system [ls]")
@example(b"[" * 20_000)
@example(b"- " * 20_000)
@example(b"? " * 5_000)
@example(b"\xff\xfe")
@example(b"---\n---\n")
@example(b"a: &x {b: 1}\nc: {<<: [" + b"*x, " * 5000 + b"]}")
@example(b"x" * (2**20 + 1))
def test_a_damaged_config_file_is_valid_or_refused(folder, data) -> None:
    load(folder, data)


@fuzzed(50)
@given(values)
def test_any_document_is_no_config(folder, document) -> None:
    load(folder, json.dumps(document).encode())


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize("bomb", [LAUGHS, MERGES], ids=["lists", "merges"])
def test_a_billion_laughs_are_refused_at_once(folder, bomb) -> None:
    assert "aliases are not read" in str(load(folder, bomb.encode()))


# --- expertmesh plan -------------------------------------------------------------------------------------------------

LOADS = {"layers": [[60, 5, 5, 5], [5, 5, 5.5, 60]]}
INVENTORY = {
    "hosts": [
        {"host": "a", "slots": 6, "rate": 1.0, "node": "n1", "rack": "r1", "cost": 1},
        {"host": "b", "slots": 6, "rate": 0.5, "node": "n2", "rack": "r2"},
        {"host": "c", "slots": 6},
    ]
}
CURRENT = {"placement": {"a": [[0, 0], [0, 1]], "b": [[1, 3]], "gone": [[1, 1]]}}


def run_plan(folder: Path, texts: dict[str, bytes], *options: str) -> None:
    """Exit code 0, or 2 with one line; a traceback would come out of `main` as itself."""
    arguments = ["expertmesh", "plan", *options]
    for name, data in texts.items():
        (folder / f"{name}.json").write_bytes(data)
        arguments += [f"--{name}", str(folder / f"{name}.json")]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            main()
    assert (ended.value.code or 0) in (0, 2)
    if ended.value.code and "Usage:" not in err.getvalue():
        assert err.getvalue().count("\n") == 1, err.getvalue()
        assert err.getvalue().startswith("expertmesh: ")
        assert err.getvalue()[:-1].isprintable(), err.getvalue()
    elif not ended.value.code and "--json" in options:
        json.loads(out.getvalue(), parse_constant=pytest.fail)


@fuzzed(30)
@given(
    st.sampled_from(["loads", "inventory", "current"]),
    st.data(),
    st.sampled_from([("--json",), ()]),
)
def test_altered_inputs_of_a_plan_are_used_or_refused(folder, name, data, options) -> None:
    inputs = {"loads": LOADS, "inventory": INVENTORY, "current": CURRENT}
    inputs[name] = data.draw(altered(inputs[name]))
    run_plan(folder, {name: json.dumps(value).encode() for name, value in inputs.items()}, *options)


@fuzzed(20)
@given(st.sampled_from(["loads", "inventory", "current"]), st.data())
def test_damaged_inputs_of_a_plan_are_used_or_refused(folder, name, data) -> None:
    inputs = {of: json.dumps(value).encode() for of, value in
              (("loads", LOADS), ("inventory", INVENTORY), ("current", CURRENT))}  # fmt: skip
    inputs[name] = data.draw(
        damaged(inputs[name]) | st.sampled_from([b"[" * 50_000, b'{"a":' * 50_000, b"5", b"null", b"", b"\xff", b"NaN"])
    )
    run_plan(folder, inputs, "--json")


@fuzzed(25)
@given(edges(2**63), edges(2**63))
def test_any_options_of_a_plan_are_used_or_refused(folder, min_replicas, landing_slots) -> None:
    inputs = {"loads": json.dumps(LOADS).encode(), "inventory": json.dumps(INVENTORY).encode()}
    run_plan(folder, inputs, "--json", "--min-replicas", str(min_replicas), "--landing-slots", str(landing_slots))
