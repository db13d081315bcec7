"""A host on a device of a given speed: it computes as ever, and then waits until that device would have been done.

`EXPERTMESH_ROW_US=60 python -m expertmesh.testing.slow_host ...`; all else as in expertmesh.hosts.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from expertmesh.hosts.__main__ import main
from expertmesh.kernels import make_kernel

if TYPE_CHECKING:
    import torch

    from expertmesh.kernels import ExpertKernel
    from expertmesh.kernels.spec import ExpertSpec, ExpertWeights

ROW_US_VARIABLE = "EXPERTMESH_ROW_US"
"""Microseconds that a row takes."""


class SlowKernel:
    """`ExpertKernel` that takes so long for each row."""

    def __init__(self, kernel: ExpertKernel, row_s: float) -> None:
        self.spec = kernel.spec
        self.num_slots = kernel.num_slots
        self._kernel = kernel
        self._row_s = row_s

    def write(self, slot: int, weights: ExpertWeights) -> None:
        self._kernel.write(slot, weights)

    def clear(self, slot: int) -> None:
        self._kernel.clear(slot)

    def run(self, x_TH: torch.Tensor, row_P: torch.Tensor, slot_P: torch.Tensor) -> torch.Tensor:
        until = time.monotonic() + self._row_s * len(row_P)
        y_PH = self._kernel.run(x_TH, row_P, slot_P)
        time.sleep(max(0.0, until - time.monotonic()))  # noqa: TID251 - a device that takes its time
        return y_PH


def make_slow_kernel(spec: ExpertSpec, num_slots: int, device: str) -> ExpertKernel:
    return SlowKernel(make_kernel(spec, num_slots, device), 1e-6 * float(os.environ[ROW_US_VARIABLE]))


if __name__ == "__main__":
    main(make_slow_kernel)
