"""Messages over a local stream socket: each is four bytes of length, little-endian, and then the message.

Reads and writes happen on the event loop, straight on the socket: at these sizes a stream abstraction would cost more
than the system calls.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable

_LENGTH = struct.Struct("<I")
_BUFFER_BYTES = 2**18


class FrameSocket:
    """A connected, non-blocking socket on a loop; owns it. Neither callback is called from within `send`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        on_message: Callable[[memoryview], None],
        on_end: Callable[[str], None],
        *,
        max_bytes: int,
    ) -> None:
        """`on_message` gets each message in a buffer that is its own only until it returns. `on_end` is told once why
        the connection ended; messages above `max_bytes` end it."""
        self._loop = loop
        self._socket = connection
        self._on_message = on_message
        self._on_end = on_end
        self.max_bytes = max_bytes
        self._buffer = bytearray(_BUFFER_BYTES)
        self._filled = 0
        self._unsent: deque[memoryview] = deque()
        self._closed = False
        loop.add_reader(connection.fileno(), self._readable)

    def send(self, *parts: bytes | memoryview) -> None:
        """Send one message, given in parts. What the socket does not take now follows as it drains."""
        if self._closed:
            return
        pieces = [memoryview(_LENGTH.pack(sum(map(len, parts)))), *(memoryview(part) for part in parts)]
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

    def _writable(self) -> None:
        try:
            sent = self._socket.sendmsg(self._unsent)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(str(error))
            return
        self._unsent = deque(_after(self._unsent, sent))
        if not self._unsent:
            self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        try:
            got = self._socket.recv_into(memoryview(self._buffer)[self._filled :])
        except BlockingIOError:
            return
        except OSError as error:
            self._end(str(error))
            return
        if got == 0:
            self._end("the connection was closed")
            return
        self._filled += got
        self._pass_on()

    def _pass_on(self) -> None:
        """Hand over the whole messages in the buffer, and keep the rest at its front."""
        start = 0
        while not self._closed and self._filled - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > self.max_bytes:
                self._end(f"a message of {length:,} bytes; {self.max_bytes:,} are allowed")
                return
            if (end := start + _LENGTH.size + length) > self._filled:
                self._make_room(start, _LENGTH.size + length)
                return
            self._on_message(memoryview(self._buffer)[start + _LENGTH.size : end])
            start = end
        self._make_room(start, _LENGTH.size)

    def _make_room(self, start: int, need: int) -> None:
        """Move what is left to the front of a buffer that holds `need` bytes."""
        left = self._filled - start
        if need > len(self._buffer):
            larger = bytearray(need + _BUFFER_BYTES)
            larger[:left] = memoryview(self._buffer)[start : self._filled]
            self._buffer = larger
        elif start and left:
            self._buffer[:left] = self._buffer[start : self._filled]
        self._filled = left

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


def _after(pieces: list[memoryview] | deque[memoryview], sent: int) -> list[memoryview]:
    """What of `pieces` is left when `sent` bytes of them are gone."""
    left = []
    for piece in pieces:
        if sent >= len(piece):
            sent -= len(piece)
        else:
            left.append(piece[sent:])
            sent = 0
    return left
