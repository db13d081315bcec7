"""The transport between processes: a link to each host, by shared memory where it is on this machine, else over gRPC.

The caller's own thread does all the work, and only while it waits for answers: handing over to another thread and back
would cost more than the rest of a send. gRPC needs an event loop; while no link is over gRPC, none runs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import select
import socket
import threading
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import uvloop

from expertmesh.tls import live_identity
from expertmesh.transport.grpc_link import GrpcLink
from expertmesh.transport.socket_link import SocketLink

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from expertmesh.ids import HostId
    from expertmesh.placement import HostInfo
    from expertmesh.tls import TlsFiles
    from expertmesh.transport import Answer, LayerRequest


T = TypeVar("T")


class Link(Protocol):
    """One connection to one host. Once broken it stays so."""

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
        self._links: dict[HostId, Link] = {}
        self._tickets = itertools.count(1)
        self._expected: set[int] = set()
        self._answers: list[Answer] = []
        self._lent: list[tuple[SocketLink, int]] = []
        """Where in shared memory the rows of `_answers` are."""
        self._lent_out: list[tuple[SocketLink, int]] = []
        """The same of answers that were handed out."""
        self._loop = uvloop.new_event_loop()
        self._remote: list[GrpcLink] = []
        """The links that need the loop."""
        self._poll = select.poll()
        self._readers: dict[int, Callable[[], None]] = {}
        """What to call when a descriptor can be read: for `_poll`, and for the loop when it runs."""
        self._alarm = _Alarm()
        self._watch(self._alarm.fileno(), self._wake_up)
        self._is_looping = False
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
            local = SocketLink.connect(host, self._token, self._deliver, self._unwatch)
            if local is not None:
                self._watch(local.fileno(), functools.partial(self._read, local))
                return local
        remote = self._loop.run_until_complete(GrpcLink.connect(host, self._token, self._deliver, self._tls))
        self._remote.append(remote)
        return remote

    def _read(self, link: SocketLink) -> None:
        if (start := link.read()) is not None:
            self._lent.append((link, start))

    def _watch(self, descriptor: int, read: Callable[[], None]) -> None:
        self._readers[descriptor] = read
        self._poll.register(descriptor, select.POLLIN)
        self._loop.add_reader(descriptor, read)

    def _unwatch(self, descriptor: int) -> None:
        del self._readers[descriptor]
        self._poll.unregister(descriptor)
        self._loop.remove_reader(descriptor)

    def _deliver(self, answer: Answer) -> None:
        if answer.ticket in self._expected:
            self._expected.remove(answer.ticket)
            self._answers.append(answer)
            self._end_loop()

    def receive(self, timeout_s: float) -> list[Answer]:
        for link, start in self._lent_out:
            link.give_back(start)
        self._lent_out = []
        if not self._answers and not self._is_woken:
            self._remote = [link for link in self._remote if not link.is_over]
            if self._remote:
                self._run_loop(timeout_s)
            else:
                for descriptor, _ in self._poll.poll(max(0.0, 1e3 * timeout_s)):
                    self._readers[descriptor]()
        self._is_woken = False
        answers, self._answers = self._answers, []
        self._lent_out, self._lent = self._lent, []
        return answers

    def _run_loop(self, timeout_s: float) -> None:
        """Until there is an answer, or the alarm."""
        self._is_looping = True
        timer = self._loop.call_later(max(0.0, timeout_s), self._end_loop)
        self._loop.run_forever()
        timer.cancel()

    def _end_loop(self) -> None:
        """Once only: a second stop would end whatever runs on the loop next."""
        if self._is_looping:
            self._is_looping = False
            self._loop.stop()

    def run(self, orders: Coroutine[Any, Any, T]) -> T:
        """Talk to hosts of something else meanwhile, and wait for it: what lives on an event loop may use this one. A
        process should have one loop for gRPC, for what comes for a loop that is closed disturbs the others."""
        return self._loop.run_until_complete(orders)

    def forget(self, ticket: int) -> None:
        self._expected.discard(ticket)
        self._answers = [answer for answer in self._answers if answer.ticket != ticket]

    def wake(self) -> None:
        self._alarm.ring()

    def _wake_up(self) -> None:
        self._alarm.silence()
        self._is_woken = True
        self._end_loop()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        links, self._links = self._links, {}
        for link in links.values():
            self._loop.run_until_complete(link.close())
        self._unwatch(self._alarm.fileno())
        self._alarm.close()
        self._loop.close()


class _Alarm:
    """A descriptor that can be read once it has been rung; that may be rung from any thread, and at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)

    def fileno(self) -> int:
        return self._ours.fileno()

    def ring(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # it rings already, or is closed
            self._theirs.send(b"!")

    def silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._ours.recv(4096):
                pass

    def close(self) -> None:
        with self._lock:
            self._ours.close()
            self._theirs.close()
