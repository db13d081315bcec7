"""The transport within one process: hosts are objects. The simplest thing that keeps the Transport's contract."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

from expertmesh.errors import NotHeldError, ReplicaUnavailableError
from expertmesh.transport import Answer

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
        self._tickets = itertools.count(1)
        self._answers: list[Answer] = []
        self._woken = threading.Event()

    def send(self, host: HostInfo, request: LayerRequest) -> int:
        ticket = next(self._tickets)
        self._answers.append(Answer(ticket, self._compute(host, request)))
        return ticket

    def _compute(self, host: HostInfo, request: LayerRequest) -> LayerReply | ReplicaUnavailableError:
        target = self._hosts.get(host.id)
        if target is None:
            return ReplicaUnavailableError(host.id, "it is gone")
        try:
            return target.compute([target.prepare(request)])[0]
        except NotHeldError as error:
            return ReplicaUnavailableError(host.id, str(error), is_alive=True)

    def receive(self, timeout_s: float) -> list[Answer]:
        if not self._answers:
            self._woken.wait(timeout_s)
            self._woken.clear()
        answers, self._answers = self._answers, []
        return answers

    def forget(self, ticket: int) -> None:
        self._answers = [answer for answer in self._answers if answer.ticket != ticket]

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        pass
