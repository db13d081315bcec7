"""The operator's commands as they are typed, against a gateway on a real socket."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from expertmesh.cli import main
from expertmesh.cli.decisions import newer
from expertmesh.cli.heatmap import draw
from expertmesh.credentials import TOKEN_VARIABLE
from expertmesh.errors import BusyError, ConfigError
from expertmesh.serve.backend import Limits, ModelCard
from expertmesh.serve.openai_api import create_app
from expertmesh.testing.http_server import listening
from expertmesh.testing.scripted import ScriptedBackend

CARD = ModelCard(name="tiny", root="tiny", max_context=64, vocab_size=420, created=7)
ROUTER = {
    "id": "k2v9x0ab", "age_s": 0.4, "epoch": 7, "avoided": [], "running": 3, "waiting": 0, "generated_tokens": 90,
    "steps": 30, "requests": 960, "hedges": 12, "overtaken": 2, "sent_again": 5, "not_finite": 0, "double_checked": 0,
}  # fmt: skip
HOST = {"pool": "cpu", "state": "ready", "slots": 4, "loading": 0, "rate": 5000.0, "rows": 800, "pid": 42}
VIEWS = {
    "hosts": [
        HOST | {"id": "cpu-0", "replicas": 3, "busy": 0.75},
        HOST | {"id": "cpu-1", "replicas": 2, "busy": 0.5, "loading": 1},
        HOST | {"id": "cpu-2", "state": "draining", "replicas": 0, "slots": None, "rate": None},
    ],
    "routers": [
        ROUTER,
        ROUTER | {"id": "mesh#routers#w0zq81cd", "epoch": 6, "age_s": 12.3, "avoided": ["cpu-0", "cpu-2"]},
    ],
    "placement": {
        "epoch": 7,
        "num_experts": [2, 2],
        "hosts": [
            {"id": "cpu-0", "experts": [[0, 0], [0, 1], [1, 0]]},
            {"id": "cpu-1", "experts": [[0, 0], [1, 1]]},
            {"id": "cpu-2", "experts": []},
        ],
    },
    "load": {"per_second": [[30.0, 10.0], [0.0, 4.0]], "imbalance": 1.25, "imbalance_of_layers": [1.5, 1.0]},
    "moves": {
        "moves": [{"what": "loading 1:0 on cpu-1", "for_s": 2.2, "left_s": 117.8, "note": "failed 2 times: no disk"}],
        "alarm": "",
    },
    "decisions": [
        {"time": 100.0, "what": "publish", "why": "5 replicas more, 0 fewer", "epoch": 1},
        {
            "time": 160.5,
            "what": "plan",
            "why": "the load: 1 replicas more, 0 fewer",
            "changes": [{"expert": [0, 0], "host": "cpu-1", "what": "add", "why": "0:0 has 75.0% of its layer's load"}],
        },
    ],
}


@pytest.fixture(scope="module")
def gateway() -> Iterator[tuple[str, ScriptedBackend]]:
    backend = ScriptedBackend(lambda request: [1], vocab_size=420)
    app = create_app(backend, CARD, None, Limits(), token="the-token")
    with listening(app) as url:
        yield url, backend


@pytest.fixture
def backend(gateway) -> ScriptedBackend:
    backend = gateway[1]
    backend.views, backend.orders, backend.refusal = dict(VIEWS), [], None
    return backend


@pytest.fixture
def command(gateway, backend, monkeypatch, capsys, tmp_path):
    """Runs `expertmesh ...` in this process: its exit code, standard output and standard error."""
    monkeypatch.setattr("expertmesh.cli.console.stdout._width", 150)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(TOKEN_VARIABLE, "the-token")

    def run(*arguments: object, url: str = gateway[0]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertmesh", *map(str, arguments), "--url", url])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.mark.parametrize(
    ("arguments", "order", "said"),
    [
        (("scale", "cpu", 4), ("scale", {"pool": "cpu", "hosts": 4}), "pool cpu is being scaled to 4 hosts"),
        (("scale", "cpu", "auto"), ("auto", {"pool": "cpu"}), "pool cpu follows its load again"),
        (("drain", "cpu-1"), ("drain", {"host": "cpu-1"}), "host cpu-1 is being drained"),
        (("rebalance",), ("rebalance", {}), "is being weighed"),
    ],
)
def test_an_order_is_sent_with_the_token_and_confirmed(command, backend, arguments, order, said):
    code, out, err = command(*arguments)
    assert (code, err, backend.orders) == (0, "", [order])
    assert said in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("scale", "cpu", "many"), "hosts: 'many' is neither a number nor `auto`"),
        (("scale", "cpu", "²"), "neither a number nor `auto`"),
        (("placement", "--layer", 2), "layer: 2 is none of 0 to 1"),
        (("placement", "--layer", -1), "layer: -1 is none of 0 to 1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(command, backend, arguments, message):
    code, out, err = command(*arguments)
    assert (code, out, backend.orders) == (2, "", [])
    assert len(err.strip().splitlines()) == 1
    assert message in err


@pytest.mark.parametrize(
    "refusal", [ConfigError("pool 'gpu': there is none; pools are cpu"), BusyError("pool cpu is just being scaled")]
)
def test_the_meshs_own_refusal_is_that_line(command, backend, refusal):
    backend.refusal = refusal
    code, out, err = command("scale", "gpu", 3)
    assert (code, out, err) == (2, "", f"expertmesh: {refusal}\n")


def test_another_machines_token_is_refused_with_what_to_do(command, backend, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "another")
    code, _, err = command("rebalance")
    assert (code, len(err.splitlines()), backend.orders) == (2, 1, [])
    assert f"set {TOKEN_VARIABLE} as where it was started" in err
    monkeypatch.delenv(TOKEN_VARIABLE)
    code, _, err = command("rebalance")
    assert code == 2
    assert "there is none here" in err


@pytest.mark.parametrize(
    "command_line", [("top", "--once"), ("placement",), ("decisions",), ("status",), ("scale", "cpu", 1)]
)
def test_where_no_mesh_is_one_line_says_so(command, command_line):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    code, out, err = command(*command_line, url=nobody)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"no mesh answers at {nobody}" in err


@pytest.mark.parametrize("command_line", [("top", "--once"), ("placement",), ("decisions",), ("status",)])
def test_a_mesh_without_a_controller_says_so(command, backend, command_line):
    backend.views.clear()
    code, _, err = command(*command_line)
    assert (code, err) == (2, "expertmesh: the script says nothing of the mesh\n")


def test_the_placement_of_all_layers_is_a_map(command):
    code, out, _ = command("placement")
    assert code == 0
    assert "epoch 7: 4 experts, 5 replicas on 3 hosts, 44 rows/s" in out
    assert "the slowest host takes 1.25 times the ideal" in out
    first, second = (line for line in out.splitlines() if line.startswith("layer"))
    assert "2" in first.removeprefix("layer 0")  # expert 0:0 has two replicas
    assert not any(mark in second.removeprefix("layer 1") for mark in "023456789!")


def test_the_placement_of_one_layer_is_a_table_of_experts_and_hosts(command, monkeypatch):
    _, out, _ = command("placement", "--layer", 0)
    hot, cold = (line.split() for line in out.splitlines()[2:4])
    assert hot == ["0", "30.0", "75.0%", "2", "●", "●", "·"]
    assert cold == ["1", "10.0", "25.0%", "1", "●", "·", "·"]
    monkeypatch.setattr("expertmesh.cli.console.stdout._width", 50)
    _, out, _ = command("placement", "--layer", 0)
    assert out.splitlines()[-2].split()[-2:] == ["cpu-0,", "cpu-1"]


def test_the_placement_as_json_has_what_the_table_has(command):
    _, out, _ = command("placement", "--layer", 1, "--json")
    assert json.loads(out) == {
        "epoch": 7,
        "imbalance": 1.25,
        "layers": [
            {
                "layer": 1,
                "imbalance": 1.0,
                "experts": [
                    {"expert": 0, "load": 0.0, "hosts": ["cpu-0"]},
                    {"expert": 1, "load": 4.0, "hosts": ["cpu-1"]},
                ],
            }
        ],
    }


def test_decisions_say_what_and_why(command):
    _, out, _ = command("decisions")
    first, second, change = out.splitlines()
    assert first.split(maxsplit=2)[1:] == ["publish", "5 replicas more, 0 fewer"]
    assert second.split(maxsplit=2)[1:] == ["plan", "the load: 1 replicas more, 0 fewer"]
    assert change.strip() == "+ 0:0 on cpu-1  0:0 has 75.0% of its layer's load"
    _, out, _ = command("decisions", "--json")
    assert [json.loads(line) for line in out.splitlines()] == VIEWS["decisions"]


def test_a_follower_sees_each_decision_once():
    log = [{"time": float(i), "what": "plan", "why": "w"} for i in range(6)]
    assert newer([], log[:3]) == log[:3]
    assert newer(log[:3], log[:3]) == []
    assert newer(log[:3], log[:5]) == log[3:5]
    assert newer(log[:3], log[2:5]) == log[3:5]  # the log keeps only the newest
    assert newer(log[:3], [*log[:2], log[2] | {"times": 2}, log[3]]) == [log[3]]
    assert newer(log[:3], log[4:]) == log[4:]  # another controller's, or too much came at once


def test_top_shows_the_whole_mesh_in_one_frame(command):
    code, out, err = command("top", "--once")
    assert (code, err) == (0, "")
    for piece in (
        "tiny", "epoch 7", "1.25 times the ideal", "cpu-0", "75%", "2 +1", "draining", "layer 0", "layer 1",
        "loading 1:0 on cpu-1", "for 2 s", "given up in 118 s", "failed 2 times: no disk", "the load: 1 replicas more",
    ):  # fmt: skip
        assert piece in out


@pytest.mark.parametrize("command_line", [("top", "--once"), ("status",)])
def test_each_router_has_a_line(command, command_line):
    _, out, _ = command(*command_line)
    lines = [line.split() for line in out.splitlines()]
    at = next(i for i, line in enumerate(lines) if line[:1] == ["router"])
    assert lines[at + 1] == ["k2v9x0ab", "7", "3", "0", "12", "5", "0", "s", "ago"]
    assert lines[at + 2] == ["w0zq81cd", "6", "3", "0", "12", "5", "12", "s", "ago", "cpu-0,", "cpu-2"]


def test_a_mesh_whose_routers_are_all_gone_is_shown_all_the_same(command, backend):
    backend.views["routers"] = []
    for command_line in (("top", "--once"), ("status",)):
        code, out, err = command(*command_line)
        assert (code, err) == (0, "")
        assert "1.25 times the ideal" in out


def test_top_cuts_what_does_not_fit_on_a_line(command, backend, monkeypatch):
    monkeypatch.setattr("expertmesh.cli.console.stdout._width", 60)
    backend.views["decisions"] = [{"time": 100.0, "what": "plan", "why": "a very long reason " * 20}]
    _, out, _ = command("top", "--once")
    assert out.count("a very long reason ") == 1
    assert all(len(line) <= 60 for line in out.splitlines())


def test_top_cries_alarm_and_says_when_nothing_moves(command, backend):
    backend.views["moves"] = {"moves": [], "alarm": "the control loop has not turned for 40 s"}
    _, out, _ = command("top", "--once")
    assert "the control loop has not turned for 40 s" in out.splitlines()[1]
    assert "nothing is under way" in out


def test_status_shows_balance_and_what_is_under_way(command):
    _, out, _ = command("status")
    assert "1.25 times the ideal" in out
    assert "1 steps are under way" in out
    _, out, _ = command("status", "--json")
    shown = json.loads(out)
    assert (shown["epoch"], shown["imbalance"], shown["alarm"]) == (7, 1.25, "")
    assert [host["id"] for host in shown["hosts"]] == ["cpu-0", "cpu-1", "cpu-2"]
    assert shown["routers"] == VIEWS["routers"]


@pytest.mark.parametrize("name", ["status", "top", "placement", "decisions", "scale", "drain", "rebalance", "demo"])
def test_every_commands_help_has_an_example(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["expertmesh", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert f"expertmesh {name}" in capsys.readouterr().out.partition("Example")[2]


# --- the heat map ----------------------------------------------------------------------------------------------------


def cells(picture: str) -> list[str]:
    """The first layer's cells."""
    line = picture.splitlines()[1].removeprefix("layer 0  ")
    return [line[i : i + 2] for i in range(0, len(line), 2)]


def test_a_cell_shows_the_load_over_the_even_share_and_the_replicas():
    loads = [0.0, 1.0, 2.0, 3.0, 3.0, 3.0, 100.0, 100.0]
    shown = cells(draw([loads], title="t", replicas=[[1, 0, 2, 9, 10, 1, 12, 1]]).plain)
    assert shown == ["  ", " !", " 2", " 9", " +", "  ", "█+", "██"]


def test_a_cell_stands_for_several_experts_where_there_is_no_room():
    loads = [1.0] * 64
    loads[37] = 64.0
    picture = draw([loads], title="t", width=9 + 2 * 16).plain
    assert "the busiest of 4" in picture.splitlines()[0]
    shown = cells(picture)
    assert len(shown) == 16
    assert [i for i, cell in enumerate(shown) if "█" in cell] == [37 // 4]


def test_a_command_starts_in_a_moment() -> None:
    """What takes seconds to import is imported by the commands that need it, when they run."""
    heavy = "torch transformers ray grpc matplotlib"
    script = f"import sys, expertmesh.cli; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
