"""Messages over a local stream socket: a small header, and a body of bulk data that only the kernel copies.

On the wire: two lengths of four bytes, little-endian, then header and body. Reads and writes happen on the event loop,
straight on the socket: at these sizes a stream abstraction would cost more than the system calls.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from numpy.typing import NDArray

_LENGTHS = struct.Struct("<II")
_NOTHING = memoryview(b"")
_DISCARDED, _DISCARDED_AT_ONCE = 2**24, 2**16
"""Bytes that a refused peer may still send before it is cut off."""
_PIECES = 512
"""Handed to the system at once, which takes 1,024 at most."""


class FrameSocket:
    """A connected, non-blocking socket on a loop; owns it. Neither callback is called from within `send`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        on_message: Callable[[bytes, NDArray[np.uint8]], None],
        on_end: Callable[[str], None],
        *,
        max_bytes: int,
        max_unsent: int | None = None,
    ) -> None:
        """`on_message` gets each message's header and body. `on_end` is told once why the connection ended; messages
        above `max_bytes` end it. While more than `max_unsent` bytes wait for the peer to read them, nothing is read
        from it: for those who answer what they read. (Of two who both did that, each could wait for the other.)"""
        self._loop = loop
        self._socket = connection
        self._on_message = on_message
        self._on_end = on_end
        self.max_bytes = max_bytes
        self._max_unsent = max_unsent
        self._lengths = bytearray(_LENGTHS.size)
        self._header_bytes = 0
        self._message: NDArray[np.uint8] | None = None  # whose lengths have been read
        self._target = memoryview(self._lengths)  # what is still to be read of the lengths or of the message
        self._unsent: deque[memoryview] = deque()
        self._num_unsent = 0  # bytes
        self._paused = False
        self._to_discard = _DISCARDED
        self._closed = False
        loop.add_reader(connection.fileno(), self._readable)

    def send(self, header: bytes, body: memoryview = _NOTHING) -> None:
        """Send one message. What the socket does not take now follows as it drains: leave `body` unchanged until it
        has been answered."""
        if self._closed:
            return
        pieces = [memoryview(_LENGTHS.pack(len(header), len(body)) + header), body]
        if not self._unsent:
            try:
                sent = self._socket.sendmsg(pieces)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # the reader finds the same, and says so
            pieces = _after(pieces, sent)
            if pieces:
                self._loop.add_writer(self._socket.fileno(), self._writable)
        self._unsent.extend(pieces)
        self._num_unsent += sum(map(len, pieces))
        if self._max_unsent is not None and self._num_unsent > self._max_unsent and not self._paused:
            self._paused = True
            self._loop.remove_reader(self._socket.fileno())

    def _writable(self) -> None:
        try:
            sent = self._socket.sendmsg(list(itertools.islice(self._unsent, _PIECES)))
        except BlockingIOError:
            return
        except OSError as error:
            self._end(str(error))
            return
        self._num_unsent -= sent
        while self._unsent and sent >= len(self._unsent[0]):
            sent -= len(self._unsent.popleft())
        if sent:
            self._unsent[0] = self._unsent[0][sent:]
        if not self._unsent:
            self._loop.remove_writer(self._socket.fileno())
        if self._paused and not self._unsent:
            self._paused = False
            self._loop.add_reader(self._socket.fileno(), self._readable)

    def refuse(self, header: bytes) -> None:
        """Send a last message and hang up; what still comes is thrown away."""
        self.send(header)
        if not self._closed:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            # To close a socket with unread data resets it, and the peer would not get to read why.
            self._loop.add_reader(self._socket.fileno(), self._discard)

    def _discard(self) -> None:
        try:
            self._to_discard -= len(thrown_away := self._socket.recv(_DISCARDED_AT_ONCE))
        except BlockingIOError:
            return
        except OSError as error:
            self._end(str(error))
            return
        if not thrown_away or self._to_discard <= 0:
            self._end("it was refused")

    def _readable(self) -> None:
        """Read one message or what there is of it; the loop calls again for the next."""
        if self._message is None:
            if not self._read():
                return
            self._header_bytes, body_bytes = _LENGTHS.unpack(self._lengths)
            if (length := self._header_bytes + body_bytes) > self.max_bytes:
                self._end(f"a message of {length:,} bytes; {self.max_bytes:,} are allowed")
                return
            self._message = np.empty(length, np.uint8)
            self._target = self._message.data
        if self._read():
            message, self._message = self._message, None
            self._target = memoryview(self._lengths)
            self._on_message(message[: self._header_bytes].tobytes(), message[self._header_bytes :])

    def _read(self) -> bool:
        """Whether the target is complete."""
        if len(self._target) == 0:
            return True
        try:
            got = self._socket.recv_into(self._target)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(str(error))
            return False
        if got == 0:
            self._end("the connection was closed")
            return False
        self._target = self._target[got:]
        return len(self._target) == 0

    def _end(self, cause: str) -> None:
        if not self._closed:
            self.close()
            self._on_end(cause)

    def close(self) -> None:
        """Close the socket. Idempotent; `on_end` is not called."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()


def _after(pieces: list[memoryview], sent: int) -> list[memoryview]:
    """What of `pieces` is left when `sent` bytes of them are gone."""
    left = []
    for piece in pieces:
        if sent >= len(piece):
            sent -= len(piece)
        else:
            left.append(piece[sent:])
            sent = 0
    return left
