"""A cluster without Ray: hosts as plain child processes, started once and lent to one mesh after the other."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING

from expertmesh.control.controller import RunningHost
from expertmesh.hosts.process import HostProcess
from expertmesh.placement import HostInfo

if TYPE_CHECKING:
    from expertmesh.config import PoolSection
    from expertmesh.ids import HostId


class ProcessCluster:
    """`Cluster` over host processes that outlive the meshes they serve; a mesh configures them anew.

    Pools' resources are ignored. Use as a context manager, which ends the processes.
    """

    def __init__(self, num_hosts: int, memory: str = "1GiB") -> None:
        self.token = secrets.token_urlsafe()
        self._stack = ExitStack()
        self.processes = [self._stack.enter_context(HostProcess(self.token, memory=memory)) for _ in range(num_hosts)]
        self._lent: dict[HostId, HostProcess] = {}

    async def start(self, host: HostId, pool: PoolSection) -> RunningHost:
        """Lend the next free process. Raises IndexError when all are lent."""
        process = next(process for process in self.processes if process not in self._lent.values())
        self._lent[host] = process
        info = HostInfo(id=host, address=process.address, socket=process.socket)
        return RunningHost(info=info, pool=pool.name, node="here", process_id=process.pid)

    async def stop(self, host: HostId) -> None:
        """Take a process back; it keeps running."""
        self._lent.pop(host, None)

    def __enter__(self) -> ProcessCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
