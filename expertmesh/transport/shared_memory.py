"""Memory that a router and one host of its machine have in common. The router makes it and says what is where.

It has no name: it lives while a process has it mapped, and goes with the last one, however that ends. Invariant: it
never shrinks, so that reading within its length cannot fail, whoever is at the other end. What is read may change at
any time; check a copy.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import mmap
import os
from typing import TYPE_CHECKING

from expertmesh.errors import ProtocolError
from expertmesh.transport.codec import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_BYTES = 2 * MAX_MESSAGE_BYTES
"""The greatest request and its reply. Only pages that were written to take room."""
_KEPT_BYTES = 64 * 2**20
"""Beyond, pages go back to the system as soon as nothing is in them."""


class SharedMemory:
    """A router's side: hands out stretches of it."""

    def __init__(self) -> None:
        """Raises OSError where the system has none to give."""
        self.descriptor = os.memfd_create("expertmesh", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, MAX_BYTES)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.bytes = mmap.mmap(self.descriptor, MAX_BYTES)
        except OSError:
            os.close(self.descriptor)
            raise
        self._taken: list[tuple[int, int]] = []
        """Start and end of each stretch that is in use, in order."""

    def take(self, num_bytes: int) -> int | None:
        """Where so many bytes are free from now on, at the start of a page; None when there is no such place."""
        size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        start = 0
        for taken, end in self._taken:  # few; the lowest place is taken, for its pages have been touched before
            if taken - start >= size:
                break
            start = end
        if start + size > MAX_BYTES:
            return None
        bisect.insort(self._taken, (start, start + size))
        return start

    def give_back(self, start: int) -> None:
        """Let the stretch at `start` be taken again."""
        _, end = self._taken.pop(bisect.bisect_left(self._taken, (start, 0)))
        if end > _KEPT_BYTES:
            unused = max(start, _KEPT_BYTES)
            with contextlib.suppress(OSError):  # then they stay
                self.bytes.madvise(mmap.MADV_REMOVE, unused, end - unused)

    def close(self) -> None:
        """Let go of it. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            del self.bytes  # it goes with the last who still reads in it


def map_shared(descriptors: Sequence[int]) -> mmap.mmap:
    """A host's side: the memory that a router has sent, as one descriptor. Raises ProtocolError for anything else."""
    for descriptor in descriptors[:1]:
        status = os.fstat(descriptor)
        with contextlib.suppress(OSError):  # it knows of no seals, or cannot be mapped
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            # Pages of another size may be missing when they are read, which would end the process.
            if seals & fcntl.F_SEAL_SHRINK and 0 < status.st_size <= MAX_BYTES and status.st_blksize == mmap.PAGESIZE:
                return mmap.mmap(descriptor, status.st_size)
    raise ProtocolError("the memory to share must be sealed, and of its proper size")
