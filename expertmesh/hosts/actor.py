"""The Ray actor that is a host on a cluster: the shell around `HostServer`, and nothing else.

Ray places the process, binds its device and ends it; rows and orders reach it over gRPC. It outlives the controller
that started it, which may die and come back, and ends by itself when it is abandoned by all.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import threading
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from expertmesh.tls import TlsFiles

LEASE_S = 60.0
"""A host that no router is connected to and no controller asks for so long ends itself."""


class HostActor:
    """One host. Every piece of state is built in `__init__`, for Ray restarts an actor through it alone."""

    def __init__(
        self,
        *,
        name: str,
        pool: str,
        token: str,
        device: str,
        memory_bytes: int | None,
        memory_share: float,
        threads: int,
        loopback: bool,
        is_urgent: bool = True,
        tls: TlsFiles | None = None,
        faults: bool = False,
        lease_s: float = LEASE_S,
    ) -> None:
        """`memory_bytes` None takes `memory_share` of what is free. `loopback` listens to this machine only. With
        `faults` it may be broken on purpose. Unless it `is_urgent`, it starts with what others leave of the cores."""
        _import_politely("expertmesh.hosts.process", 5 if is_urgent else 15)
        import torch

        from expertmesh.allocator import LAUNCH_BYTES, keep_freed_memory
        from expertmesh.clock import SYSTEM_CLOCK
        from expertmesh.hosts.faults import Faults
        from expertmesh.hosts.host import Host
        from expertmesh.hosts.process import HostServer, available_memory
        from expertmesh.kernels import make_kernel

        keep_freed_memory(LAUNCH_BYTES)
        torch.set_num_threads(threads)
        address = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        memory = memory_bytes or int(available_memory(device) * memory_share)
        self._name = name
        self._pool = pool
        broken = Faults(SYSTEM_CLOCK) if faults else None
        host = Host(memory, device, broken.kernels(make_kernel) if broken else make_kernel)
        self._server = HostServer(host, token, bind=address, tls=tls, faults=broken)
        threading.Thread(target=self._end_when_abandoned, args=(lease_s,), daemon=True).start()

    async def describe(self) -> dict[str, Any]:
        """Who and where it is."""
        context = ray.get_runtime_context()
        return {
            "id": self._name,
            "pool": self._pool,
            "address": self._server.address,
            "socket": self._server.socket,
            "node": context.get_node_id(),
            "labels": context.get_node_labels(),
            "process_id": os.getpid(),
        }

    async def live(self) -> None:
        """Does not return. The call fails when the process ends, which is how its controller hears of it at once.

        The call of a controller that has died goes on. So it must take nothing that the next one's calls need: a
        thread of a few, for instance.
        """
        await asyncio.get_running_loop().create_future()

    def _end_when_abandoned(self, lease_s: float) -> None:
        never = threading.Event()
        while self._server.idle_s < lease_s:
            never.wait(lease_s / 4)
        os._exit(0)  # Ray has no way for an actor to end but within a call, and nobody calls


def _import_politely(module: str, niceness: int) -> None:
    """Import a module that takes seconds of a core, without taking them from those who serve on this machine.

    In a thread of its own, for an ordinary user may lower a thread's priority and not raise it again.
    """

    def load() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        importlib.import_module(module)

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
