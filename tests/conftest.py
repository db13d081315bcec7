"""What tests of several kinds share."""

from __future__ import annotations

import sys

import pytest

from expertmesh.cli import main


@pytest.fixture
def trace_command(monkeypatch, capsys):
    """Runs `expertmesh trace ...` in this process: its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertmesh", "trace", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run
