"""The transport within one process: hosts are objects. The simplest thing that keeps the Transport's contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expertmesh.errors import NotHeldError, ReplicaUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from expertmesh.hosts.host import Host
    from expertmesh.ids import HostId
    from expertmesh.placement import HostInfo
    from expertmesh.transport import LayerReply, LayerRequest


class LocalTransport:
    """Calls hosts directly. A host that is taken out of `hosts` is dead to it."""

    def __init__(self, hosts: Mapping[HostId, Host]) -> None:
        self._hosts = hosts

    async def call(self, host: HostInfo, request: LayerRequest) -> LayerReply:
        target = self._hosts.get(host.id)
        if target is None:
            raise ReplicaUnavailableError(host.id, "it is gone")
        try:
            return target.compute([target.prepare(request)])[0]
        except NotHeldError as error:
            raise ReplicaUnavailableError(host.id, str(error)) from error

    async def close(self) -> None:
        pass
