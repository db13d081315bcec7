"""How this process's memory allocator treats freed memory: one call at a process's start.

glibc gives large buffers back to the kernel as soon as they are freed, and pays for every page anew when the next batch
needs them. A process that works in batches of like sizes should keep them. Elsewhere than on glibc this does nothing.
"""

from __future__ import annotations

import ctypes

FORWARD_BYTES = 32 * 2**20
"""For a router: a forward pass and the sampler make and drop buffers of megabytes. The most that glibc allows."""
LAUNCH_BYTES = 512 * 1024
"""For a host: a launch's buffers are below this, most experts above."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 512 * 2**20


def keep_freed_memory(below_bytes: int) -> None:
    """Keep freed buffers smaller than `below_bytes` for the next batch; larger ones go straight to and from the kernel.

    Weights belong on the far side of the bound: among kept buffers they would leave holes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, below_bytes)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
