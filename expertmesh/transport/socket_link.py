"""A link to a host of the same machine: rows in shared memory, and short messages over a local socket that say so.

The socket's name is random and in Linux's abstract namespace: it is known only through the placement, can be reached
only from this machine (and this container's network), and vanishes with the process that listens, however that ends.
Connecting is therefore also the test whether the host is here. protos/host.proto has the messages.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import sys
from typing import TYPE_CHECKING

import numpy as np

from expertmesh.transport.codec import DTYPE_NUMBERS
from expertmesh.transport.pending import Pending
from expertmesh.transport.shared_memory import SharedMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from expertmesh.placement import HostInfo
    from expertmesh.transport import Answer, LayerRequest

REQUEST = struct.Struct("<QQ6I")
"""id, start; layer, dtype, num_rows, row_bytes, num_pairs, num_experts."""
REPLY = struct.Struct("<QfI")
"""id, compute_s, error code (0: none); the error's text follows."""
MAX_REPLY_BYTES = 4096


def listen() -> tuple[socket.socket, str] | None:
    """A listening socket and the name to give routers; None where the system has none such."""
    if sys.platform != "linux":
        return None
    name = f"expertmesh-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{name}")
    listener.listen()
    listener.setblocking(False)
    return listener, name


class SocketLink:
    """One connection. Its first message is the token, its second the memory. See `network.Link`.

    Neither side keeps what the socket does not take: a peer that leaves hundreds of messages unread is given up.
    """

    def __init__(
        self,
        connection: socket.socket,
        memory: SharedMemory,
        host: HostInfo,
        deliver: Callable[[Answer], None],
        ending: Callable[[int], None],
    ) -> None:
        self._socket = connection
        self._memory = memory
        self._ending = ending
        self._pending = Pending(host.id, deliver)
        self._places: dict[int, tuple[int, int, int]] = {}
        """Of each request without a reply as yet, wanted or not: where it is, and where its reply begins and ends."""

    @staticmethod
    def connect(
        host: HostInfo, token: str, deliver: Callable[[Answer], None], ending: Callable[[int], None]
    ) -> SocketLink | None:
        """None when nobody listens here (the host is on another machine, or dead), or memory cannot be shared. When the
        link breaks, or is closed, `ending` is called with its descriptor."""
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.setblocking(False)
            try:
                connection.connect(f"\0{host.socket}")
                memory = undo.enter_context(contextlib.closing(SharedMemory()))
                connection.send(token.encode())
                socket.send_fds(connection, [b"memory"], [memory.descriptor])
            except OSError:
                return None
            undo.pop_all()
        return SocketLink(connection, memory, host, deliver, ending)

    def fileno(self) -> int:
        """Of the socket: when it can be read, so should the link."""
        return self._socket.fileno()

    @property
    def broken(self) -> str | None:
        return self._pending.broken

    def send(self, ticket: int, request: LayerRequest) -> None:
        if not self._pending.add(ticket, request):
            return
        rows, pair_rows, experts = request.rows, request.pair_rows, request.experts
        (num_rows, row_bytes), num_pairs, num_experts = rows.shape, len(pair_rows), len(experts)
        tables = struct.pack(f"<{2 * num_experts}I", *experts, *request.counts)
        tables = pair_rows.astype(np.int32, copy=False).tobytes() + tables
        size = (num_rows + num_pairs) * row_bytes + len(tables)
        start = self._memory.take(size)
        if start is None:
            self._end(f"there is no room for {size:,} bytes more in the memory shared with it")
            return
        first = start + num_rows * row_bytes
        end = first + num_pairs * row_bytes
        self._places[ticket] = start, first, end
        self._memory.bytes[start:first] = rows.data
        self._memory.bytes[end : start + size] = tables
        dtype = DTYPE_NUMBERS[request.dtype]
        message = REQUEST.pack(ticket, start, request.layer, dtype, num_rows, row_bytes, num_pairs, num_experts)
        try:
            self._socket.send(message)
        except BlockingIOError:
            self._end("it leaves its requests unread")
        except OSError as error:
            self._end(str(error))

    def read(self) -> int | None:
        """Pass on the reply that has come, or what it means that none ever will. A reply's rows stay where the host
        wrote them: what is returned then is to be given to `give_back` when they have been read."""
        try:
            message = self._socket.recv(MAX_REPLY_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            self._end(str(error))
            return None
        if len(message) < REPLY.size:
            self._end("it sent a message that is no reply" if message else "the connection was closed")
            return None
        ticket, compute_s, code = REPLY.unpack_from(message)
        if ticket == 0:  # it refuses the connection
            self._end(message[REPLY.size :].decode(errors="replace"))
            return None
        if (place := self._places.pop(ticket, None)) is None:
            return None
        start, first, end = place
        if code:
            self._pending.refuse(ticket, code, message[REPLY.size :].decode(errors="replace"))
        else:
            self._pending.reply(ticket, memoryview(self._memory.bytes)[first:end], compute_s)
        return start

    def give_back(self, start: int) -> None:
        """Let memory be used for other requests."""
        if self._pending.broken is None:
            self._memory.give_back(start)

    def _end(self, cause: str) -> None:
        if self._pending.broken is None:
            self._ending(self._socket.fileno())
            self._socket.close()
            self._memory.close()
            self._pending.fail(cause)

    async def close(self) -> None:
        self._end("closed by us")
