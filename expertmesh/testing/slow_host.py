"""A host that is slower than its machine, as an old device would be: it computes everything several times.

`EXPERTMESH_SLOWNESS=3 python -m expertmesh.testing.slow_host ...`; all else as in expertmesh.hosts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from expertmesh.hosts.__main__ import main
from expertmesh.kernels import make_kernel

if TYPE_CHECKING:
    import torch

    from expertmesh.kernels import ExpertKernel
    from expertmesh.kernels.spec import ExpertSpec, ExpertWeights

SLOWNESS_VARIABLE = "EXPERTMESH_SLOWNESS"


class SlowKernel:
    """`ExpertKernel` that takes `times` as long as another."""

    def __init__(self, kernel: ExpertKernel, times: int) -> None:
        self.spec = kernel.spec
        self.num_slots = kernel.num_slots
        self._kernel = kernel
        self._times = times

    def write(self, slot: int, weights: ExpertWeights) -> None:
        self._kernel.write(slot, weights)

    def clear(self, slot: int) -> None:
        self._kernel.clear(slot)

    def run(self, x_TH: torch.Tensor, row_P: torch.Tensor, slot_P: torch.Tensor) -> torch.Tensor:
        for _ in range(self._times - 1):
            self._kernel.run(x_TH, row_P, slot_P)
        return self._kernel.run(x_TH, row_P, slot_P)


def make_slow_kernel(spec: ExpertSpec, num_slots: int, device: str) -> ExpertKernel:
    return SlowKernel(make_kernel(spec, num_slots, device), int(os.environ[SLOWNESS_VARIABLE]))


if __name__ == "__main__":
    main(make_slow_kernel)
