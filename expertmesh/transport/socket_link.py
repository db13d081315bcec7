"""A link over a local socket, to a host of the same machine: the messages of the gRPC stream, with their rows beside.

The socket's name is random and in Linux's abstract namespace: it is known only through the placement, can be reached
only from this machine (and this container's network), and vanishes with the process that listens, however that ends.
Connecting is therefore also the test whether the host is here.
"""

from __future__ import annotations

import secrets
import socket
import sys
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from expertmesh._proto import host_pb2 as pb
from expertmesh.transport import codec
from expertmesh.transport.codec import MAX_MESSAGE_BYTES
from expertmesh.transport.frames import FrameSocket
from expertmesh.transport.pending import Pending

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from expertmesh.placement import HostInfo
    from expertmesh.transport import Answer, LayerRequest


def listen() -> tuple[socket.socket, str] | None:
    """A listening socket and the name to give routers; None where the system has none such."""
    if sys.platform != "linux":
        return None
    name = f"expertmesh-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen()
    listener.setblocking(False)
    return listener, name


class SocketLink:
    """One connection. Its first message is the token. See `network.Link`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        host: HostInfo,
        token: str,
        deliver: Callable[[Answer], None],
    ) -> None:
        self._pending = Pending(host.id, deliver)
        self._frames = FrameSocket(loop, connection, self._receive, self._pending.fail, max_bytes=MAX_MESSAGE_BYTES)
        self._frames.send(token.encode())

    @staticmethod
    def connect(
        loop: asyncio.AbstractEventLoop, host: HostInfo, token: str, deliver: Callable[[Answer], None]
    ) -> SocketLink | None:
        """None when nobody listens here: the host is on another machine, or dead."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(f"\0{host.socket}")
        except OSError:
            connection.close()
            return None
        return SocketLink(loop, connection, host, token, deliver)

    @property
    def broken(self) -> str | None:
        return self._pending.broken

    def send(self, ticket: int, request: LayerRequest) -> None:
        if self._pending.add(ticket, request):
            message = codec.encode_request(ticket, request)
            self._frames.send(message.SerializeToString(), request.rows.reshape(-1).data)

    def _receive(self, header: bytes, rows: NDArray[np.uint8]) -> None:
        try:
            reply = pb.ExchangeReply.FromString(header)
        except DecodeError:
            self._frames.close()
            self._pending.fail("it sent a message that is no ExchangeReply")
            return
        if reply.id:
            self._pending.reply(reply, rows)
        else:
            self._pending.fail(reply.error.message)  # it refuses the connection, and closes it

    async def close(self) -> None:
        self._frames.close()
        self._pending.fail("closed by us")
