"""A fault script against a mesh that it starts: a short form of what `expertmesh chaos run` does."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from expertmesh.bench.measure import free_port
from tests.integration.served import command_line

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(300)]


def test_hosts_are_killed_under_load_and_nobody_notices(tmp_path) -> None:
    picture = tmp_path / "run.svg"
    arguments = ("kill-hosts", "--short", "--json", "--picture", str(picture), "--port", str(free_port()))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        command_line("chaos", "run", *arguments),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=environment,
    )
    assert done.stdout, done.stderr[-2000:]
    report = json.loads(done.stdout)
    verdicts = {oracle["name"]: oracle for oracle in report["oracles"]}
    assert report["faults"] == {"kill": 2}
    for name in ("fired", "answered", "equal", "whole"):
        assert verdicts[name]["holds"], verdicts[name]
    assert all("has ended" in strike["proof"] for strike in report["strikes"])
    assert report["requests"] > 4
    assert report["recovery_s"]["never"] == 0
    assert "<svg" in picture.read_text()
    if done.returncode:  # how long a stall lasts depends on who else uses this machine
        assert [name for name, of in verdicts.items() if of["holds"] is False] == ["stall"]
