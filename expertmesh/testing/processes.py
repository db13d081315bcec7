"""A cluster without Ray: hosts as plain child processes, started as needed and lent to one mesh after the other."""

from __future__ import annotations

import asyncio
import os
import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING

from expertmesh.control.cluster import RunningHost
from expertmesh.hosts.process import HostProcess
from expertmesh.placement import HostInfo
from expertmesh.testing.slow_host import ROW_US_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from expertmesh.config import PoolSection
    from expertmesh.ids import HostId


class ProcessCluster:
    """`Cluster` over host processes that outlive the meshes they serve; a mesh configures them anew.

    Pools' resources are ignored. Use as a context manager, which ends the processes.
    """

    def __init__(self, num_hosts: int = 0, memory: str = "1GiB", row_us: Mapping[str, float] | None = None) -> None:
        """`num_hosts` are started at once, more when they are asked for. `row_us`: by pool, how long its
        hosts take for a row, as if on slower devices; those are always started anew."""
        self.token = secrets.token_urlsafe()
        self._memory = memory
        self._row_us = row_us or {}
        self._stack = ExitStack()
        self._idle = [self._launch() for _ in range(num_hosts)]
        self._lent: dict[HostId, tuple[RunningHost, HostProcess]] = {}
        self._stopped: dict[HostId, asyncio.Event] = {}
        self._note: bytes | None = None

    @property
    def num_hosts(self) -> int:
        """Processes that run, lent or not."""
        return len(self._idle) + len(self._lent)

    def _launch(self, pool: str = "") -> HostProcess:
        if pool not in self._row_us:
            return self._stack.enter_context(HostProcess(self.token, memory=self._memory))
        slow = {ROW_US_VARIABLE: str(self._row_us[pool])}
        module = "expertmesh.testing.slow_host"
        return self._stack.enter_context(HostProcess(self.token, memory=self._memory, module=module, environment=slow))

    async def start(self, host: HostId, pool: PoolSection) -> RunningHost:
        """Lend a process that is idle, or a new one."""
        is_usual = pool.name not in self._row_us
        process = self._idle.pop() if self._idle and is_usual else await asyncio.to_thread(self._launch, pool.name)
        info = HostInfo(id=host, address=process.address, socket=process.socket)
        running = RunningHost(info=info, pool=pool.name, node="here", process_id=process.pid)
        self._lent[host] = running, process
        return running

    async def running(self) -> list[RunningHost]:
        return [running for running, _ in self._lent.values()]

    async def ended(self, host: HostId) -> str:
        """Wait for the death of a process, or for its return by `stop`."""
        if host not in self._lent:
            return "it was stopped"
        ended = self._stopped[host] = asyncio.Event()
        descriptor = os.pidfd_open(self._lent[host][1].pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return "it was killed" if self._lent.pop(host, None) else "it was stopped"

    async def stop(self, host: HostId) -> None:
        """Take a process back; it keeps running."""
        lent = self._lent.pop(host, None)
        if lent is not None:
            self._idle.append(lent[1])
        if host in self._stopped:
            self._stopped.pop(host).set()

    def kill(self, host: HostId) -> None:
        """SIGKILL a host's process."""
        self._lent[host][1].kill()

    async def save(self, state: bytes) -> None:
        self._note = state

    async def saved(self) -> bytes | None:
        return self._note

    def __enter__(self) -> ProcessCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
