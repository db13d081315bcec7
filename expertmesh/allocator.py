"""How this process gets memory from the operating system: what its allocator keeps, and huge pages.

glibc gives large buffers back to the kernel as soon as they are freed, and pays for every page anew when the next batch
needs them. A process that works in batches of like sizes should keep them. Elsewhere than on glibc this does nothing.

Weights are read from end to end in every step, and each small page costs a walk through the page tables. Linux gives
huge pages by default, or only to memory that asks.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

FORWARD_BYTES = 32 * 2**20
"""For a router: a forward pass and the sampler make and drop buffers of megabytes. The most that glibc allows."""
LAUNCH_BYTES = 512 * 1024
"""For a host: a launch's buffers are below this, most experts above."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 512 * 2**20
_HUGE_PAGE_BYTES = 2 * 2**20


def keep_freed_memory(below_bytes: int) -> None:
    """Keep freed buffers smaller than `below_bytes` for the next batch; larger ones go straight to and from the kernel.

    Weights belong on the far side of the bound: among kept buffers they would leave holes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, below_bytes)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


def huge_pages(num_bytes: int) -> torch.Tensor:
    """Zeroed memory [num_bytes] of uint8, in huge pages where the system has them. It is taken when first written."""
    # A mapping begins at a small page's border: as much more, so that what is given out begins at a huge one's.
    length = max(num_bytes, 1) + _HUGE_PAGE_BYTES
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Memory that may be shared, Python's default, gets huge pages by another setting, which is mostly off.
        mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
    else:
        mapping = mmap.mmap(-1, length)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE_BYTES
    return memory[start : start + num_bytes]
