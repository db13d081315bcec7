"""Timing several sides of one comparison fairly, and saying what they ran on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.allocator import FORWARD_BYTES, keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from multiprocessing.connection import Connection

WARM_UP = 100
"""Calls that are made and not counted."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some samples: the median, and the tenth and ninetieth percentile."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        ordered = sorted(samples)
        last = len(ordered) - 1
        return Spread(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])

    def to_json(self, digits: int = 6) -> dict[str, float]:
        return {"median": round(self.median, digits), "p10": round(self.p10, digits), "p90": round(self.p90, digits)}


Side = Callable[[], AbstractContextManager[Callable[[], object]]]
"""One side of a comparison: makes everything ready and yields the call that is timed."""


class SideProcess:
    """One side in a process of its own, so that the sides share the machine and nothing else."""

    def __init__(self, side: Side) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=_measure, args=(side, theirs))
        self._process.start()
        theirs.close()
        self.median_s(WARM_UP)

    def median_s(self, calls: int) -> float:
        """Make `calls` calls in a row: the median of their seconds."""
        self._orders.send(calls)
        seconds: float = self._orders.recv()
        return seconds

    def close(self) -> None:
        self._orders.close()
        self._process.join()


def _measure(side: Side, orders: Connection) -> None:
    """A side's process: obeys until its pipe is closed."""
    keep_freed_memory(FORWARD_BYTES)  # as routers do; it helps every side
    torch.set_num_threads(1)

    def obey() -> None:
        with side() as call, contextlib.suppress(EOFError):
            while True:
                orders.send(statistics.median(_time(call) for _ in range(orders.recv())))

    # As in a router, whose engine has a thread of its own: in the main one, event loops mind signals too.
    thread = threading.Thread(target=obey)
    thread.start()
    thread.join()


def _time(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def alternate(sides: Mapping[str, Side], *, rounds: int, calls: int) -> dict[str, list[float]]:
    """Per side, the median seconds of one call in each round.

    In every round each side makes `calls` calls in a row, so that a slow minute of the machine falls on all of them;
    ratios are taken round by round.
    """
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, side in sides.items():
            processes[name] = SideProcess(side)
            stack.callback(processes[name].close)
        medians: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, process in processes.items():
                medians[name].append(process.median_s(calls))
    return medians


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The ratio of two sides, round by round."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def free_port() -> int:
    """One that nobody listens at on this machine, now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(command: str) -> dict[str, Any]:
    """What a figure means nothing without: the command, the commit, the machine and the versions."""
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "grpcio", "protobuf", "ray", "transformers")
    }
    return {
        "command": command,
        "commit": _commit(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


def _commit() -> str | None:
    """The commit of a source checkout, None for an installed package."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
