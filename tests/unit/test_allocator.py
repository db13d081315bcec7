"""What the allocator promises, seen in page faults: kept buffers touch no new page, and huge pages are few."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.allocator import huge_pages

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


def has_huge_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.skipif(not has_huge_pages(), reason="the system gives none")
def test_memory_lies_in_huge_pages() -> None:
    num_bytes = 64 * 2**20
    memory = huge_pages(num_bytes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory.fill_(1)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert len(memory) == num_bytes
    assert taken < num_bytes / resource.getpagesize() / 2, "one fault for each small page is twice as many"
