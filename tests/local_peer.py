"""A router on a host's local socket, written from protos/host.proto: what it sends may be anything."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
from typing import NamedTuple

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
SIZE = 2**16


class Reply(NamedTuple):
    id: int
    compute_s: float
    error: int
    message: str


def connect(name: str) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.connect(f"\0{name}")  # blocking: it may have to wait for its turn
    peer.settimeout(20)
    return peer


def sealed(size: int = SIZE, seals: int = SEALS, flags: int = 0) -> int:
    """A descriptor of memory to share."""
    descriptor = os.memfd_create("peer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def share(peer: socket.socket, descriptor: int) -> None:
    socket.send_fds(peer, [b"memory"], [descriptor])
    os.close(descriptor)


def open_session(peer: socket.socket, token: str) -> mmap.mmap:
    """Show the token and share memory, which is returned."""
    peer.send(token.encode())
    descriptor = sealed()
    memory = mmap.mmap(descriptor, SIZE)
    share(peer, descriptor)
    return memory


def local_request(
    request_id: int,
    *,
    start: int = 0,
    layer: int = 0,
    dtype: int = 1,
    num_rows: int = 1,
    row_bytes: int = 64,
    num_pairs: int = 1,
    num_experts: int = 1,
) -> bytes:
    return struct.pack("<QQ6I", request_id, start, layer, dtype, num_rows, row_bytes, num_pairs, num_experts)


def read(peer: socket.socket) -> Reply | None:
    """The next reply; None when the host has hung up."""
    data = peer.recv(4096)
    return Reply(*struct.unpack_from("<QfI", data), data[16:].decode()) if data else None


def is_hung_up(peer: socket.socket) -> bool:
    try:
        return peer.recv(1) == b""
    except ConnectionResetError:  # it had not read all that was sent
        return True
