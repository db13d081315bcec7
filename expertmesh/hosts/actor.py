"""The Ray actor that is a host on a cluster: the shell around `HostServer`, and nothing else.

Ray places the process, binds its device and ends it; rows and orders reach it over gRPC.
"""

from __future__ import annotations

import os
from typing import Any

import ray
import torch

from expertmesh.allocator import LAUNCH_BYTES, keep_freed_memory
from expertmesh.hosts.host import Host
from expertmesh.hosts.process import HostServer, available_memory


class HostActor:
    """One host. Every piece of state is built in `__init__`, for Ray restarts an actor through it alone."""

    def __init__(
        self, *, token: str, device: str, memory_bytes: int | None, memory_share: float, threads: int, loopback: bool
    ) -> None:
        """`memory_bytes` None takes `memory_share` of what is free. `loopback` listens to this machine only."""
        keep_freed_memory(LAUNCH_BYTES)
        torch.set_num_threads(threads)
        address = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        memory = memory_bytes or int(available_memory(device) * memory_share)
        self._server = HostServer(Host(memory, device), token, bind=address)

    def describe(self) -> dict[str, Any]:
        """Where it is: address, local socket, Ray node, process."""
        return {
            "address": self._server.address,
            "socket": self._server.socket,
            "node": ray.get_runtime_context().get_node_id(),
            "process_id": os.getpid(),
        }
