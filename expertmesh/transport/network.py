"""The transport between processes: a link to each host, a local socket where the host is on this machine, else gRPC.

Its event loop runs in the caller's own thread, and only while that thread waits for answers: handing over to another
thread and back would cost more than the rest of a send.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Protocol

import uvloop

from expertmesh.tls import live_identity
from expertmesh.transport.grpc_link import GrpcLink
from expertmesh.transport.socket_link import SocketLink

if TYPE_CHECKING:
    from expertmesh.ids import HostId
    from expertmesh.placement import HostInfo
    from expertmesh.tls import TlsFiles
    from expertmesh.transport import Answer, LayerRequest


class Link(Protocol):
    """One connection to one host, on the transport's loop. Once broken it stays so."""

    @property
    def broken(self) -> str | None:
        """Why it is of no more use; None while it is."""
        ...

    def send(self, ticket: int, request: LayerRequest) -> None:
        """Send, without waiting. Every request gets one answer, at the latest when the link breaks."""
        ...

    async def close(self) -> None: ...


class NetworkTransport:
    """Links to hosts, opened when first needed and again after a break. See `transport.Transport`."""

    def __init__(self, token: str, *, local_sockets: bool = True, tls: TlsFiles | None = None) -> None:
        """`local_sockets` False goes over gRPC even to hosts of this machine. `tls` is for gRPC: a local socket is the
        kernel's, and nobody reads along.

        Raises ConfigError when the `tls` files will not do.
        """
        if tls is not None:
            live_identity(tls)  # better now than at the first request
        self._tls = tls
        self._token = token
        self._local_sockets = local_sockets
        self._loop = uvloop.new_event_loop()
        self._links: dict[HostId, Link] = {}
        self._tickets = itertools.count(1)
        self._expected: set[int] = set()
        self._answers: list[Answer] = []
        self._is_waiting = False
        self._is_woken = False

    def send(self, host: HostInfo, request: LayerRequest) -> int:
        link = self._links.get(host.id)
        if link is None or link.broken is not None:
            link = self._links[host.id] = self._open(host)
        ticket = next(self._tickets)
        self._expected.add(ticket)
        link.send(ticket, request)
        return ticket

    def _open(self, host: HostInfo) -> Link:
        if self._local_sockets and host.socket:
            link = SocketLink.connect(self._loop, host, self._token, self._deliver)
            if link is not None:
                return link
        return self._loop.run_until_complete(GrpcLink.connect(host, self._token, self._deliver, self._tls))

    def _deliver(self, answer: Answer) -> None:
        if answer.ticket in self._expected:
            self._expected.remove(answer.ticket)
            self._answers.append(answer)
            self._end_wait()

    def receive(self, timeout_s: float) -> list[Answer]:
        if not self._answers and not self._is_woken:
            self._is_waiting = True
            timer = self._loop.call_later(max(0.0, timeout_s), self._end_wait)
            self._loop.run_forever()
            timer.cancel()
        self._is_woken = False
        answers, self._answers = self._answers, []
        return answers

    def _end_wait(self) -> None:
        """Let `receive` return. Once only: a second stop would end whatever runs on the loop next."""
        if self._is_waiting:
            self._is_waiting = False
            self._loop.stop()

    def forget(self, ticket: int) -> None:
        self._expected.discard(ticket)
        self._answers = [answer for answer in self._answers if answer.ticket != ticket]

    def wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_woken = True
        self._end_wait()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        links, self._links = self._links, {}
        for link in links.values():
            self._loop.run_until_complete(link.close())
        self._loop.close()
