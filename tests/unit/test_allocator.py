"""What `keep_freed_memory` promises, seen in page faults: buffers made and dropped again touch no new page."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from expertmesh.allocator import FORWARD_BYTES, keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory(FORWARD_BYTES)
def batch():
    buffers = [np.ones(2**20, np.uint8) for _ in range(8)]
for _ in range(3):
    batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    batch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_buffers_are_kept_for_the_next_batch() -> None:
    assert faults("keep") < 100
    assert faults("default") > 1000
