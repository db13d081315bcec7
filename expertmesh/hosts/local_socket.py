"""A host's local socket: the exchange for routers on the same machine. See transport/socket_link.py."""

from __future__ import annotations

import hmac
import logging
import socket
import struct
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from expertmesh._proto import host_pb2 as pb
from expertmesh.hosts.rows import error_reply
from expertmesh.refusals import RefusalLog
from expertmesh.transport.codec import MAX_MESSAGE_BYTES
from expertmesh.transport.frames import FrameSocket

if TYPE_CHECKING:
    import asyncio

    import numpy as np
    from numpy.typing import NDArray

    from expertmesh.hosts.rows import RowService

logger = logging.getLogger(__name__)

MAX_TOKEN_BYTES = 4096
"""What a connection may send before it has shown the token."""
MAX_STRANGERS = 64
"""Connections that have not shown the token, or were refused: one more, and the oldest is closed. Anyone on the machine
can open some, and descriptors are few; a router shows its token at once."""
PATIENCE_S = 5.0
"""For how long a connection may go without showing the token, or stay after it was refused."""


class LocalSocket:
    """Accepts connections on the host's loop until closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: socket.socket, rows: RowService, token: str) -> None:
        self._loop = loop
        self._listener = listener
        self._rows = rows
        self._token = token.encode()
        self._connections = _Connections(RefusalLog(logger))
        loop.add_reader(listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it gave up before its turn, or descriptors have run out: those connected go on
        connection.setblocking(False)
        stranger = _Connection(self._loop, connection, self._rows, self._token, self._connections)
        self._connections.strangers[stranger] = None
        if len(self._connections.strangers) > MAX_STRANGERS:
            next(iter(self._connections.strangers)).close()

    def close(self) -> None:
        """Break all connections and take the name away. Idempotent."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
        for connection in (*self._connections.strangers, *self._connections.trusted):
            connection.close()


class _Connections:
    """Those that are open now."""

    def __init__(self, refusals: RefusalLog) -> None:
        self.refusals = refusals
        self.strangers: dict[_Connection, None] = {}
        """The oldest first."""
        self.trusted: set[_Connection] = set()


class _Connection:
    """One router. It must show the token before anything else is read."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        rows: RowService,
        token: bytes,
        connections: _Connections,
    ) -> None:
        self._loop = loop
        self._rows = rows
        self._token = token
        self._all = connections
        self._user = _user_of(connection)
        self._frames = FrameSocket(
            loop,
            connection,
            self._receive,
            lambda _: self._gone(),
            max_bytes=MAX_TOKEN_BYTES,
            max_unsent=MAX_MESSAGE_BYTES,
        )
        self._cut_off = loop.call_later(PATIENCE_S, self._too_late)

    def _receive(self, header: bytes, rows: NDArray[np.uint8]) -> None:
        if self not in self._all.trusted:
            self._check(header)
            return
        try:
            request = pb.ExchangeRequest.FromString(header)
        except DecodeError:
            self._refuse("a message that is no ExchangeRequest")
            return
        self._rows.submit(request, rows, self._respond)

    def _check(self, token: bytes) -> None:
        if not hmac.compare_digest(token, self._token):
            self._all.refusals.refused(self._user, "wrong or missing token")
            self._refuse("UNAUTHENTICATED: wrong or missing token")
            return
        self._cut_off.cancel()
        del self._all.strangers[self]
        self._all.trusted.add(self)
        self._frames.max_bytes = MAX_MESSAGE_BYTES
        self._rows.connections += 1

    def _respond(self, reply: pb.ExchangeReply | None, rows: NDArray[np.uint8]) -> None:
        if reply is not None:
            self._frames.send(reply.SerializeToString(), rows.reshape(-1).data)

    def _refuse(self, cause: str) -> None:
        """Say why, as a reply to nothing, and hang up."""
        self._cut_off.cancel()
        self._cut_off = self._loop.call_later(PATIENCE_S, self.close)
        self._frames.refuse(error_reply(0, pb.Error.INVALID, cause).SerializeToString())

    def _too_late(self) -> None:
        self._all.refusals.refused(self._user, f"no token within {PATIENCE_S:g} s")
        self.close()

    def close(self) -> None:
        self._frames.close()
        self._gone()

    def _gone(self) -> None:
        self._cut_off.cancel()
        self._all.strangers.pop(self, None)
        if self in self._all.trusted:
            self._all.trusted.remove(self)
            self._rows.connections -= 1


_CREDENTIALS = struct.Struct("3i")


def _user_of(connection: socket.socket) -> str:
    """Whose process is at the other end, by the kernel's word."""
    _process, user, _group = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return f"user {user} of this machine"
