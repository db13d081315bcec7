"""Signals that a process has another one send to itself: from outside, as a crash would come, at whatever moment.

Knows nothing of why. Its invariant: the caller has `ANSWER_S` left to say what it has asked for.
"""

from __future__ import annotations

import os
import subprocess

ANSWER_S = 0.05


def kill_soon() -> None:
    """SIGKILL to this process."""
    _send(f"kill -KILL {os.getpid()}")


def kill_parent_soon() -> None:
    """SIGKILL to the process that started this one."""
    _send(f"kill -KILL {os.getppid()}")


def pause_soon(seconds: float) -> None:
    """SIGSTOP to this process, and SIGCONT so much later: one that is stopped cannot wake itself."""
    _send(f"kill -STOP {os.getpid()}; sleep {seconds}; kill -CONT {os.getpid()}")


def _send(orders: str) -> None:
    in_background = f"(sleep {ANSWER_S}; {orders}) </dev/null >/dev/null 2>&1 &"
    subprocess.run(["/bin/sh", "-c", in_background], check=True, start_new_session=True)
