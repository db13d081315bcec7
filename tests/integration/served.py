"""A mesh that the `expertmesh serve` command runs in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from expertmesh.bench.measure import free_port

START_S = 240.0


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "expertmesh", *arguments]


@dataclass
class Served:
    """A running mesh."""

    url: str
    token: str
    process: subprocess.Popen[str]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of ours; it must succeed."""
        return subprocess.run(command_line(*arguments), check=True, capture_output=True, text=True, timeout=120)

    def rows(self) -> int:
        """Pairs computed by all hosts so far."""
        return sum(host["rows"] for host in httpx.get(f"{self.url}/mesh/hosts", timeout=30).json())

    def wait_idle(self, quiet_s: float = 1.0, timeout_s: float = 30.0) -> None:
        """Until the hosts have computed nothing for `quiet_s`."""
        pause, deadline = threading.Event(), time.monotonic() + timeout_s
        rows, since = self.rows(), time.monotonic()
        while time.monotonic() - since < quiet_s:
            assert time.monotonic() < deadline, "the hosts never came to rest"
            pause.wait(0.1)
            if (now := self.rows()) != rows:
                rows, since = now, time.monotonic()


@contextlib.contextmanager
def served(target: str, arguments: Sequence[str] = (), log: Path | None = None) -> Iterator[Served]:
    """Run `expertmesh serve TARGET`, wait for its ready line, and end it with SIGTERM as an operator would."""
    token = secrets.token_urlsafe()
    environment = os.environ | {"EXPERTMESH_TOKEN": token}
    environment.pop("RAY_ADDRESS", None)
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(log.open("w")) if log else subprocess.DEVNULL
        process = subprocess.Popen(
            command_line("serve", target, "--port", str(free_port()), *arguments),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        killer = threading.Timer(START_S, process.kill)
        killer.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        killer.cancel()
        assert line.startswith("ready http"), f"not ready: {line!r}; {log.read_text() if log else ''}"
        try:
            yield Served(url=line.split()[1], token=token, process=process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=90)
            process.stdout.close()
