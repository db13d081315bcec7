"""An operator's orders on a mesh that runs: from the command through gateway, router and controller, and back."""

from __future__ import annotations

import json
import os
import subprocess

import httpx
import pytest

from tests.integration.served import Served, command_line

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def run(mesh: Served, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"EXPERTMESH_TOKEN": token or mesh.token, "COLUMNS": "140"}
    command = command_line(*arguments, "--url", mesh.url)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_an_order_takes_effect(mesh: Served) -> None:
    done = run(mesh, "rebalance")
    assert (done.returncode, done.stderr) == (0, "")
    entries = [json.loads(line) for line in run(mesh, "decisions", "--json").stdout.splitlines()]
    assert ("asked", "rebalance") in [(entry["what"], entry["why"]) for entry in entries]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("scale", "gpu", "1"), "pool 'gpu': there is none; pools are cpu"),
        (("scale", "cpu", "5"), "pool cpu cannot have 5 hosts"),
        (("scale", "gpu", "auto"), "pool 'gpu': there is none"),
        (("drain", "cpu-77"), "host 'cpu-77': there is none; hosts are cpu-0, cpu-1"),
    ],
)
def test_what_cannot_be_is_refused_in_the_controllers_own_words(mesh: Served, arguments, message) -> None:
    done = run(mesh, *arguments)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert message in done.stderr


def test_nobody_orders_without_the_token(mesh: Served) -> None:
    done = run(mesh, "scale", "cpu", "2", token="another")
    assert (done.returncode, done.stdout) == (2, "")
    assert "set EXPERTMESH_TOKEN" in done.stderr


def test_the_views_show_the_mesh_that_runs(mesh: Served) -> None:
    frame = run(mesh, "top", "--once").stdout
    assert all(piece in frame for piece in ("tiny", "cpu-0", "cpu-1", "ready", "layer 3"))
    table = run(mesh, "placement", "--layer", "0").stdout
    assert [line.split()[0] for line in table.splitlines()[2:]] == [str(expert) for expert in range(16)]
    metrics = httpx.get(f"{mesh.url}/metrics").text
    assert 'expertmesh_hosts{pool="cpu",state="ready"} 2.0' in metrics
    assert "expertmesh_controller_up 1.0" in metrics
