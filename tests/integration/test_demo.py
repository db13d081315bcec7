"""The demo, as a newcomer runs it."""

from __future__ import annotations

import os
import subprocess

import pytest

from expertmesh.bench.measure import free_port
from tests.integration.served import command_line

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


def test_the_demo_tells_its_whole_story_and_every_check_holds(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"HOME": str(tmp_path), "COLUMNS": "120"}  # a newcomer has no token yet
    environment.pop("EXPERTMESH_TOKEN", None)
    command = command_line("demo", "--port", str(free_port()))
    done = subprocess.run(command, capture_output=True, text=True, timeout=360, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✗" not in done.stdout
    assert done.stdout.count("✓") == 10
    for chapter in ("A host more", "The topic turned", "kill -9", "Scale down again", "stopped: none of the 4 host"):
        assert chapter in done.stdout
    assert (tmp_path / ".expertmesh" / "token").stat().st_mode & 0o777 == 0o600
