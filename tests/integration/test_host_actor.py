"""A host as a Ray actor: it outlives its controllers, however many, and whatever they were waiting for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# In a process of its own: one that has used gRPC cannot start Ray.
CONTROLLERS = """
import asyncio, ray
from expertmesh.config import PoolSection
from expertmesh.control.ray_cluster import RayCluster, end_hosts

async def main():
    async with asyncio.timeout(60):
        started = await RayCluster("m", "t", loopback=True).start("cpu-0", PoolSection(cpus=0.1, memory="1MiB"))
    for _ in range(8):
        controller = RayCluster("m", "t", loopback=True)
        async with asyncio.timeout(10):
            (found,) = await controller.running()
        assert found == started
        waits = asyncio.create_task(controller.ended("cpu-0"))
        assert not (await asyncio.wait([waits], timeout=0.1))[0]
        waits.cancel()  # to Ray, this is a caller that is gone
    last = asyncio.create_task(controller.ended("cpu-0"))
    await asyncio.sleep(0.1)
    end_hosts("m")
    async with asyncio.timeout(10):
        print(await last)

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
asyncio.run(main())
"""


def test_a_host_answers_its_ninth_controller() -> None:
    """Calls of those that have died go on in it, and must not take what the next one's calls need."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    script = [sys.executable, "-c", CONTROLLERS]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "actor" in done.stdout.lower(), done.stdout
