"""What the processes of a mesh on this machine take, by the part that they play. Reads /proc.

Invariant: a process that ends while it is looked at counts for nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ROLES = {"HostActor": "hosts", "ControllerActor": "controller", ":router": "routers", ":gateway": "gateways"}
"""What Ray calls our processes, and what we call them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of a mesh."""

    pid: int
    role: str
    memory_mib: float
    """That is its own: not shared, not of files."""
    threads: int
    descriptors: int


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    return _state(pid) not in ("", "Z", "X")


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP."""
    return _state(pid) == "T"


def _state(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def parent(pid: int) -> int | None:
    """Who started a process; None if it is gone."""
    try:
        return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def processes(parents: Iterable[int]) -> list[Process]:
    """The parts of a mesh among the children of `parents`: Ray's node managers start them all."""
    known = set(parents)
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    found = (_look(pid) for pid in pids if parent(pid) in known)
    return [process for process in found if process is not None]


def _look(pid: int) -> Process | None:
    folder = Path("/proc") / str(pid)
    try:
        title = (folder / "cmdline").read_bytes().decode(errors="replace")
        is_rays = title.startswith("ray::")
        role = next((role for part, role in ROLES.items() if part in title and is_rays), None)
        if role is None:
            return None
        lines = (folder / "status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        return Process(
            pid=pid,
            role=role,
            memory_mib=int(values["RssAnon"].split()[0]) / 1024,
            threads=int(values["Threads"]),
            descriptors=len(os.listdir(folder / "fd")),
        )
    except (OSError, KeyError):
        return None  # it has just ended


def totals(found: Iterable[Process]) -> Mapping[str, Mapping[str, float]]:
    """By role, what a process takes on average, and how many there are."""
    by_role: dict[str, list[Process]] = {}
    for process in found:
        by_role.setdefault(process.role, []).append(process)
    return {
        role: {
            "processes": len(of),
            "memory_mib": sum(process.memory_mib for process in of) / len(of),
            "threads": sum(process.threads for process in of) / len(of),
            "descriptors": sum(process.descriptors for process in of) / len(of),
        }
        for role, of in sorted(by_role.items())
    }
