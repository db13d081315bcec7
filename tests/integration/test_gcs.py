"""Ray's head without its control service (GCS): the mesh serves on, and obeys orders again once it is back.

The service keeps what it knows in Redis, so a new one goes on where the old one was killed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from expertmesh.bench.measure import free_port
from expertmesh.models import PROMPTS
from tests.integration.served import command_line

REDIS = shutil.which("redis-server")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.long,
    pytest.mark.timeout(300),
    pytest.mark.skipif(REDIS is None, reason="redis-server is not installed (apt-get install redis-server)"),
]

OUTAGE_S = 8.0
MESH = """
applications:
  - name: expertmesh
    route_prefix: /
    import_path: expertmesh.app:build
    args: {model: tiny, dtype: float32, pools: [{hosts: 2, max: 3, cpus: 0.5}]}
"""


@dataclass
class Head:
    """A Ray cluster of one machine, apart from all others, and a mesh on it."""

    url: str
    folder: Path
    environment: dict[str, str]
    service: psutil.Process

    def kill_service(self) -> tuple[list[str], dict[str, str]]:
        """How it was started."""
        how = self.service.cmdline(), self.service.environ()
        self.service.send_signal(signal.SIGKILL)
        self.service.wait(10)
        return how

    def complete(self, prompt: str) -> str:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def scale(self, hosts: int) -> None:
        headers = {"authorization": f"Bearer {self.environment['EXPERTMESH_TOKEN']}"}
        body = {"pool": "cpu", "hosts": hosts}
        answer = httpx.post(f"{self.url}/mesh/scale", json=body, headers=headers, timeout=30)
        assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with contextlib.ExitStack() as stack:
        # Unix sockets lie in it, and their paths must be short.
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="em-", dir="/tmp", ignore_cleanup_errors=True))
        )
        redis_port, port = free_port(), free_port()
        redis = subprocess.Popen(
            [str(REDIS), "--port", str(redis_port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)],
            stdout=subprocess.DEVNULL,
        )
        stack.callback(_end, redis)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{redis_port}",
            "RAY_external_storage_namespace": secrets.token_hex(4),
            "RAY_worker_niceness": "0",
            "EXPERTMESH_TOKEN": secrets.token_urlsafe(),
        }
        start = [f"{Path(sys.executable).parent}/ray", "start", "--head", f"--port={port}", f"--temp-dir={folder}"]
        start += [
            "--num-cpus=8",
            "--include-dashboard=false",
            "--disable-usage-stats",
            "--dashboard-agent-listen-port=0",
        ]
        stack.callback(_end_all, folder)
        subprocess.run(start, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=90)
        (folder / "mesh.yaml").write_text(MESH)
        environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        environment.pop("RAY_REDIS_ADDRESS")
        mesh = subprocess.Popen(
            command_line("serve", str(folder / "mesh.yaml"), "--port", str(free_port())),
            stdout=subprocess.PIPE,
            stderr=(folder / "serve.log").open("w"),
            text=True,
            env=environment,
        )
        stack.callback(_end, mesh)
        assert mesh.stdout is not None
        line = mesh.stdout.readline()
        assert line.startswith("ready http"), (folder / "serve.log").read_text()
        (service,) = [process for process in _processes(folder) if "gcs_server" in process.name()]
        yield Head(line.split()[1], folder, environment, service)


def _processes(folder: Path) -> list[psutil.Process]:
    """Those that Ray runs for the cluster in this folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in part for part in process.cmdline()):
                found.append(process)
    return found


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_all(folder: Path) -> None:
    """The cluster, and whatever runs on it: workers end with their raylet."""
    processes = _processes(folder)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=20)


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    pause, deadline = threading.Event(), time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.2)


def test_serving_goes_on_without_the_control_service_and_orders_are_obeyed_when_it_is_back(head: Head) -> None:
    right = {prompt: head.complete(prompt) for prompt in PROMPTS.values()}
    arguments, environment = head.kill_service()
    until_s, answered = time.monotonic() + OUTAGE_S, 0
    while time.monotonic() < until_s:
        for prompt, text in right.items():
            assert head.complete(prompt) == text
            answered += 1
    assert answered >= 2 * len(right)
    back = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert all(head.complete(prompt) == text for prompt, text in right.items())
        hosts = {host["id"] for host in httpx.get(f"{head.url}/mesh/hosts", timeout=30).json()}
        assert len(hosts) == 2
        head.scale(3)
        until(lambda: len(httpx.get(f"{head.url}/mesh/hosts", timeout=30).json()) == 3, timeout_s=60)
        assert hosts < {host["id"] for host in httpx.get(f"{head.url}/mesh/hosts", timeout=30).json()}
        assert all(head.complete(prompt) == text for prompt, text in right.items())
    finally:
        back.kill()
        back.wait()
