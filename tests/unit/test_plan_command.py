"""`expertmesh plan`: files in, a plan out; mistakes are one clear line and exit code 2."""

from __future__ import annotations

import json
import sys

import pytest

from expertmesh.cli import main

LOADS = {"layers": [[60, 5, 5, 5, 5, 5], [5, 5, 5, 5, 5, 60]]}
HOSTS = {
    "hosts": [
        {"host": "a", "slots": 8, "rate": 1.0, "node": "n1", "rack": "r1"},
        {"host": "b", "slots": 8, "rate": 0.5, "node": "n2", "rack": "r2"},
        {"host": "c", "slots": 8},
    ]
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command on JSON values, or on text as it is; what it printed, and its exit code."""

    def run(*options: str, loads=LOADS, inventory=HOSTS, current=None) -> tuple[str, str, int]:
        arguments = ["expertmesh", "plan", *options]
        for name, value in (("loads", loads), ("inventory", inventory), ("current", current)):
            if value is not None:
                path = tmp_path / f"{name}.json"
                path.write_text(value if isinstance(value, str) else json.dumps(value))
                arguments += [f"--{name}", str(path)]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return out, err, caught.value.code

    return run


def test_the_plan_is_printed_as_json(run) -> None:
    out, _, code = run("--json")
    assert code == 0
    planned = json.loads(out)
    held = {(layer, expert) for experts in planned["placement"].values() for layer, expert in experts}
    assert held == {(layer, expert) for layer in range(2) for expert in range(6)}
    assert planned["moves"] == sum(map(len, planned["placement"].values())) == len(planned["reasons"])
    assert sum(planned["split"]["0:0"].values()) == pytest.approx(1)
    assert len(planned["split"]["0:0"]) > 1
    assert planned["max_time"] == pytest.approx(planned["ideal"], rel=0.06)


@pytest.mark.parametrize("whole", [True, False], ids=["the whole output", "its placement"])
def test_a_plan_from_its_own_output_moves_nothing(run, whole) -> None:
    first = json.loads(run("--json")[0])
    again = json.loads(run("--json", current=first if whole else first["placement"])[0])
    assert again["moves"] == 0
    assert again["placement"] == first["placement"]


def test_options_reach_the_planner(run) -> None:
    assert json.loads(run("--json", "--min-replicas", "2")[0])["survives"] == "node"


def test_a_layer_that_nobody_can_serve_is_null(run) -> None:
    inventory = {"hosts": [{"host": "a", "slots": 1}, {"host": "b", "slots": 9, "rate": 0}]}
    out, _, _ = run("--json", loads={"layers": [[2, 1]]}, inventory=inventory)
    assert json.loads(out)["max_time"] == [None]


def test_without_json_a_person_can_read_it(run) -> None:
    out, _, code = run()
    assert code == 0
    assert "12 replicas" not in out
    assert "times the ideal" in out
    assert all(name in out for name in ("host", "rack", "n1", "layer 1"))
    first = json.loads(run("--json")[0])
    shifted = {"layers": LOADS["layers"][::-1]}
    out, _, _ = run(loads=shifted, current=first)
    assert "+ 0:5 on" in out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"loads": {"layers": [[1, 2], [3]]}}, "loads: layer 1 has 1 experts and another has 2"),
        ({"loads": {"layers": [[1, "much"]]}}, "layers.0.1: Input should be a valid number"),
        ({"loads": {"layer": [[1]]}}, "unknown key 'layer'; did you mean 'layers'?"),
        ({"loads": '{"layers": [[NaN]]}'}, "layers.0.0: Input should be a finite number"),
        ({"loads": "["}, "loads.json: Invalid JSON"),
        ({"inventory": {"hosts": [{"host": "a", "slots": 9, "speed": 1}]}}, "hosts.0: unknown key 'speed'"),
        ({"inventory": {"hosts": [{"slots": 9}]}}, "hosts.0.host: Field required"),
        ({"inventory": {"hosts": [{"host": "a", "slots": 3}]}}, "the pools are too small"),
        ({"current": {"a": [[9, 0]]}}, "current: expert 9:0 is not among the loads"),
        ({"current": {"a": [[0]]}}, "current.json: a.0"),
        ({"current": "nothing"}, "current.json: Expecting value"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, files, message) -> None:
    out, err, code = run("--json", **files)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_file_that_is_not_there_is_named(run) -> None:
    _, err, code = run("--current", "/nowhere/current.json", "--json")
    assert code == 2
    assert "/nowhere/current.json" in err
