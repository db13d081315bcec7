"""A host's local socket: the exchange for routers on the same machine. See transport/socket_link.py."""

from __future__ import annotations

import hmac
import logging
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from expertmesh._proto import host_pb2 as pb
from expertmesh.hosts.rows import error_reply
from expertmesh.transport.codec import MAX_MESSAGE_BYTES
from expertmesh.transport.frames import FrameSocket

if TYPE_CHECKING:
    import asyncio
    import socket

    import numpy as np
    from numpy.typing import NDArray

    from expertmesh.hosts.rows import RowService

logger = logging.getLogger(__name__)

MAX_TOKEN_BYTES = 4096
"""What a connection may send before it has shown the token."""


class LocalSocket:
    """Accepts connections on the host's loop until closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: socket.socket, rows: RowService, token: str) -> None:
        self._loop = loop
        self._listener = listener
        self._rows = rows
        self._token = token.encode()
        self._connections: set[_Connection] = set()
        loop.add_reader(listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it gave up before its turn, or descriptors have run out: those connected go on
        connection.setblocking(False)
        self._connections.add(_Connection(self._loop, connection, self._rows, self._token, self._connections))

    def close(self) -> None:
        """Break all connections and take the name away. Idempotent."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
        for connection in list(self._connections):
            connection.close()


class _Connection:
    """One router. It must show the token before anything else is read."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        rows: RowService,
        token: bytes,
        others: set[_Connection],
    ) -> None:
        self._rows = rows
        self._token = token
        self._others = others
        self._trusted = False
        self._frames = FrameSocket(loop, connection, self._receive, lambda _: self._gone(), max_bytes=MAX_TOKEN_BYTES)

    def _receive(self, header: bytes, rows: NDArray[np.uint8]) -> None:
        if not self._trusted:
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
            logger.warning("refused a local connection: wrong or missing token")
            self._refuse("UNAUTHENTICATED: wrong or missing token")
            return
        self._trusted = True
        self._frames.max_bytes = MAX_MESSAGE_BYTES
        self._rows.connections += 1

    def _respond(self, reply: pb.ExchangeReply, rows: NDArray[np.uint8]) -> None:
        self._frames.send(reply.SerializeToString(), rows.reshape(-1).data)

    def _refuse(self, cause: str) -> None:
        """Say why, as a reply to nothing, and hang up."""
        self._frames.refuse(error_reply(0, pb.Error.INVALID, cause).SerializeToString())

    def close(self) -> None:
        self._frames.close()
        self._gone()

    def _gone(self) -> None:
        if self in self._others:
            self._others.remove(self)
            self._rows.connections -= self._trusted
