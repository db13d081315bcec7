"""Another baseline of the exchange bench: local sockets that echo bytes, by blocking calls and no more."""

from __future__ import annotations

import secrets
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def serve(num_bytes: int) -> None:
    """Print the socket's name, echo messages of so many bytes to one peer until it hangs up."""
    name = f"expertmesh-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()
        peer, _ = listener.accept()
    message = memoryview(bytearray(num_bytes))
    with peer:
        while _filled(peer, message):
            peer.sendall(message)


def _filled(peer: socket.socket, message: memoryview) -> bool:
    """Read a whole message; False when the peer hung up."""
    while len(message):
        if not (got := peer.recv_into(message)):
            return False
        message = message[got:]
    return True


class RawSockets:
    """One connection to each of the names."""

    def __init__(self, names: Sequence[str], num_bytes: int) -> None:
        self._replies = memoryview(bytearray(num_bytes))
        self._peers = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in names]
        for peer, name in zip(self._peers, names, strict=True):
            peer.connect(f"\0{name}")

    def echo(self, message: bytes) -> memoryview:
        """Send to all, then read from all: the last reply."""
        for peer in self._peers:
            peer.sendall(message)
        for peer in self._peers:
            assert _filled(peer, self._replies)
        return self._replies

    def close(self) -> None:
        for peer in self._peers:
            peer.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
