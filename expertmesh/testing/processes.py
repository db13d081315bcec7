"""A cluster without Ray: hosts as plain child processes, started as needed and lent to one mesh after the other."""

from __future__ import annotations

import asyncio
import os
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from expertmesh.control.cluster import RunningHost
from expertmesh.hosts.process import HostProcess
from expertmesh.testing.slow_host import ROW_US_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from expertmesh.config import PoolSection
    from expertmesh.ids import HostId
    from expertmesh.tls import TlsFiles


class ProcessCluster:
    """`Cluster` over host processes that outlive the meshes they serve; a mesh configures them anew.

    Pools' resources are ignored. Use as a context manager, which ends the processes.
    """

    def __init__(
        self,
        num_hosts: int = 0,
        memory: str = "1GiB",
        row_us: Mapping[str, float] | None = None,
        tls: TlsFiles | None = None,
        *,
        faults: bool = False,
        folders: Mapping[str, Path] | None = None,
    ) -> None:
        """`num_hosts` are started at once, more when they are asked for. `row_us`: by pool, how long its
        hosts take for a row, as if on slower devices; those are always started anew. With `faults`, all of them may be
        broken on purpose. `folders`: by pool, where its hosts are started: a model's relative path is another file
        there; those are always started anew, too."""
        self.token = secrets.token_urlsafe()
        self._memory = memory
        self._tls = tls
        self._faults = faults
        self._folders = folders or {}
        self._row_us = row_us or {}
        self._stack = ExitStack()
        self._idle = [self._launch() for _ in range(num_hosts)]
        self._lent: dict[HostId, tuple[RunningHost, HostProcess]] = {}
        self._starts = ThreadPoolExecutor()
        self._coming: dict[HostId, Future[RunningHost]] = {}
        self._unwanted: set[HostId] = set()
        """Stopped while they were started."""
        self._stopped: dict[HostId, asyncio.Event] = {}
        self._note: bytes | None = None

    @property
    def num_hosts(self) -> int:
        """Processes that run, lent or not."""
        return len(self._idle) + len(self._lent)

    @property
    def lent(self) -> set[HostId]:
        """The hosts that were started and not stopped."""
        return set(self._lent)

    def _launch(self, pool: str = "") -> HostProcess:
        options: dict[str, Any] = {"folder": self._folders.get(pool)}
        if pool in self._row_us:
            slow = {ROW_US_VARIABLE: str(self._row_us[pool])}
            options |= {"module": "expertmesh.testing.slow_host", "environment": slow}
        process = HostProcess(self.token, memory=self._memory, faults=self._faults, tls=self._tls, **options)
        return self._stack.enter_context(process)

    async def start(self, host: HostId, pool: PoolSection, *, is_urgent: bool = True) -> RunningHost:
        """Lend a process that is idle, or a new one. It is there whatever becomes of who asked for it."""
        if self._idle and self._is_usual(pool.name):
            return self._lend(host, pool.name, self._idle.pop())
        coming = self._coming[host] = self._starts.submit(lambda: self._lend(host, pool.name, self._launch(pool.name)))
        return await asyncio.shield(asyncio.wrap_future(coming))

    def _is_usual(self, pool: str) -> bool:
        """Whether the pool's hosts are like those of others."""
        return pool not in self._row_us and pool not in self._folders

    def _lend(self, host: HostId, pool: str, process: HostProcess) -> RunningHost:
        running = RunningHost(info=process.info(host), pool=pool, node="here", process_id=process.pid)
        self._coming.pop(host, None)
        if host in self._unwanted:
            self._idle.append(process)
        else:
            self._lent[host] = running, process
        return running

    async def running(self) -> list[RunningHost]:
        """Those that are just being started are waited for."""
        for coming in list(self._coming.values()):
            await asyncio.shield(asyncio.wrap_future(coming))
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
        if self._coming.pop(host, None) is not None:
            self._unwanted.add(host)
        lent = self._lent.pop(host, None)
        if lent is not None:
            running, process = lent
            if self._is_usual(running.pool):
                self._idle.append(process)
            else:
                process.close()
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
        self._starts.shutdown()
        self._stack.close()
