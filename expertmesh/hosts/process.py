"""Running a host's service: in a thread of this process, or as a process of its own without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.credentials import TOKEN_VARIABLE
from expertmesh.hosts.service import RunningServer
from expertmesh.placement import HostInfo
from expertmesh.transport.loop import LoopThread

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from expertmesh.hosts.faults import Faults
    from expertmesh.hosts.host import Host
    from expertmesh.ids import HostId
    from expertmesh.tls import TlsFiles


class HostServer:
    """A host and its gRPC server on an event loop in a thread, from construction to `close`."""

    def __init__(
        self,
        host: Host,
        token: str,
        *,
        bind: str = "127.0.0.1",
        advertise: str = "",
        port: int = 0,
        tls: TlsFiles | None = None,
        faults: Faults | None = None,
        train: Path | None = None,
    ) -> None:
        """Listen at `bind`; routers reach it at `advertise` (the bound address unless given). `faults`: those of a host
        that may be broken on purpose. `train`: the folder in which one that may be trained saves.

        Raises ConfigError when the port is taken, or the `tls` files will not do.
        """
        self._thread = LoopThread("expertmesh-host")
        try:
            self._server = self._thread.run(
                RunningServer.start(host, token, bind, port, tls=tls, faults=faults, train=train)
            )
        except BaseException:
            self._thread.close()
            raise
        self.address = f"{advertise or bind}:{self._server.port}"
        self.socket = self._server.socket

    @property
    def idle_s(self) -> float:
        """For how long no router was connected and no controller asked."""
        return self._server.idle_s

    def close(self) -> None:
        """End the streams and free the port. Idempotent."""
        if not self._thread.is_closed:
            self._thread.run(self._server.stop())
            self._thread.close()


class HostProcess:
    """A host in a child process (`python -m expertmesh.hosts`), which ends with this object or with this process."""

    def __init__(
        self,
        token: str,
        *,
        memory: str = "1GiB",
        threads: int = 1,
        faults: bool = False,
        module: str = "expertmesh.hosts",
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        tls: TlsFiles | None = None,
        train: Path | None = None,
    ) -> None:
        """`module` is run with our environment and `environment`, in `folder` if given. With `faults` it may be broken
        on purpose; with `train` it may be trained, and saves in that folder."""
        command = [sys.executable, "-m", module, "--memory", memory, "--threads", str(threads)]
        command += ["--faults"] if faults else []
        command += ["--train", str(train)] if train is not None else []
        if tls is not None:
            command += ["--tls", tls.ca, tls.certificate, tls.key]
        variables = os.environ | {TOKEN_VARIABLE: token} | dict(environment or {})
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, cwd=folder, text=True
        )
        assert self._process.stdout is not None
        ready: dict[str, Any] = json.loads(self._process.stdout.readline() or "{}")
        if "address" not in ready:
            raise RuntimeError(f"a host process ended before it was ready: {' '.join(command)}")
        self.address: str = ready["address"]
        self.socket: str = ready["socket"]
        self.pid = self._process.pid

    def info(self, host: HostId) -> HostInfo:
        """As a placement has it, under the id `host`."""
        return HostInfo(id=host, address=self.address, socket=self.socket)

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL it, as a crash would."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it and wait. Idempotent."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> HostProcess:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()


def available_memory(device: str) -> int:
    """Bytes that experts may take on `device`: nine tenths of what is free now."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(torch.device(device))[0] * 0.9)
    with open("/proc/meminfo") as lines:
        free_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return int(free_kib * 1024 * 0.9)
