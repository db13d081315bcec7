"""A host's local socket: the exchange for routers on the same machine. See transport/socket_link.py."""

from __future__ import annotations

import contextlib
import functools
import hmac
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from expertmesh._proto import host_pb2 as pb
from expertmesh.errors import ProtocolError
from expertmesh.hosts.rows import Refusal
from expertmesh.ids import MAX_EXPERTS
from expertmesh.refusals import RefusalLog
from expertmesh.transport import LayerReply
from expertmesh.transport.shared_memory import map_shared
from expertmesh.transport.socket_link import MAX_REPLY_BYTES, REPLY, REQUEST

if TYPE_CHECKING:
    import asyncio
    import mmap

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
    """One router. It must show the token, then the memory that it shares, before anything else is read."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        rows: RowService,
        token: bytes,
        connections: _Connections,
    ) -> None:
        self._loop = loop
        self._socket = connection
        self._rows = rows
        self._token = token
        self._all = connections
        self._user = _user_of(connection)
        self._memory: mmap.mmap | None = None
        self._reply_at: dict[int, int] = {}
        """Where the rows of each reply go that has not been sent."""
        self._cut_off = loop.call_later(PATIENCE_S, self._too_late)
        loop.add_reader(connection.fileno(), self._read_token)

    def _receive(self, most: int) -> bytes:
        """The next message; nothing when there is none, or will be none any more."""
        try:
            message = self._socket.recv(most)
        except BlockingIOError:
            return b""
        except OSError:
            message = b""
        if not message:
            self.close()
        return message

    def _read_token(self) -> None:
        if not (token := self._receive(MAX_TOKEN_BYTES)):
            return
        if not hmac.compare_digest(token, self._token):
            self._all.refusals.refused(self._user, "wrong or missing token")
            self._refuse("UNAUTHENTICATED: wrong or missing token")
            return
        self._cut_off.cancel()
        del self._all.strangers[self]
        self._all.trusted.add(self)
        self._rows.connections += 1
        self._loop.add_reader(self._socket.fileno(), self._read_memory)

    def _read_memory(self) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._socket, REQUEST.size, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            message, descriptors = b"", []
        if not message:
            self.close()
            return
        try:
            self._memory = map_shared(descriptors)
        except ProtocolError as error:
            self._refuse(str(error))
        else:
            self._loop.add_reader(self._socket.fileno(), self._read_request)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _read_request(self) -> None:
        """One request; the loop calls again for the next."""
        if not (message := self._receive(REQUEST.size + 1)):
            return
        if len(message) != REQUEST.size:
            self._refuse("a message that is no request")
            return
        request_id, start, layer, dtype, num_rows, row_bytes, num_pairs, num_experts = REQUEST.unpack(message)
        memory = self._memory
        assert memory is not None
        reply_at = start + num_rows * row_bytes
        pairs_at = reply_at + num_pairs * row_bytes
        experts_at = pairs_at + 4 * num_pairs
        end = experts_at + 8 * num_experts
        if end > len(memory) or num_experts > MAX_EXPERTS:
            self._refuse("a request beyond the memory that is shared")
            return
        experts = struct.unpack(f"<{2 * num_experts}I", memory[experts_at:end])
        view = memoryview(memory)
        header = _Header(
            layer, dtype, num_rows, experts[:num_experts], experts[num_experts:], view[pairs_at:experts_at]
        )
        self._reply_at[request_id] = reply_at
        self._rows.submit(header, view[start:reply_at], functools.partial(self._respond, request_id))

    def _respond(self, request_id: int, answer: LayerReply | Refusal | None) -> None:
        reply_at = self._reply_at.pop(request_id, None)
        if answer is None or self._memory is None:
            return
        if isinstance(answer, LayerReply):
            # A reply may be sent twice. From the first on, the memory is the router's again.
            if reply_at is not None:
                self._memory[reply_at : reply_at + answer.rows.nbytes] = answer.rows.data
            self._send(REPLY.pack(request_id, answer.compute_s, 0))
        else:
            self._send(_refusal(request_id, answer))

    def _send(self, message: bytes) -> None:
        try:
            self._socket.send(message)
        except OSError:
            self.close()  # it is gone, or has left hundreds of replies unread

    def _refuse(self, cause: str) -> None:
        """Say why, as a reply to nothing, and hang up."""
        self._memory = None
        self._cut_off.cancel()
        self._cut_off = self._loop.call_later(PATIENCE_S, self.close)
        self._loop.add_reader(self._socket.fileno(), self._discard)
        self._send(_refusal(0, Refusal(pb.Error.INVALID, cause)))
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def _discard(self) -> None:
        """To close a socket with unread messages resets it, and the peer would not get to read why."""
        self._receive(1)

    def _too_late(self) -> None:
        self._all.refusals.refused(self._user, f"no token within {PATIENCE_S:g} s")
        self.close()

    def close(self) -> None:
        """Idempotent."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        self._memory = None
        self._cut_off.cancel()
        self._all.strangers.pop(self, None)
        if self in self._all.trusted:
            self._all.trusted.remove(self)
            self._rows.connections -= 1


class _Header(NamedTuple):
    """`codec.RequestHeader`."""

    layer: int
    dtype: int
    num_rows: int
    experts: tuple[int, ...]
    counts: tuple[int, ...]
    pair_rows: memoryview


def _refusal(request_id: int, refusal: Refusal) -> bytes:
    return REPLY.pack(request_id, 0.0, refusal.code) + refusal.message.encode()[: MAX_REPLY_BYTES - REPLY.size]


_CREDENTIALS = struct.Struct("3i")


def _user_of(connection: socket.socket) -> str:
    """Whose process is at the other end, by the kernel's word."""
    _process, user, _group = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return f"user {user} of this machine"
