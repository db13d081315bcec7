"""A host whose experts return their rows: what is left of an exchange when nothing is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expertmesh.hosts.__main__ import main
from expertmesh.hosts.configuration import HostConfiguration
from expertmesh.ids import ExpertId
from expertmesh.kernels.spec import Activation, ExpertSpec, ExpertWeights

if TYPE_CHECKING:
    from expertmesh.hosts.host import Host

HIDDEN = 1024
CONFIGURATION = HostConfiguration(
    checkpoint="",
    specs=(ExpertSpec(hidden=HIDDEN, intermediate=1, activation=Activation(name="silu"), dtype="bfloat16"),),
    layer_specs=(0,),
    layer_experts=(4,),
)


class EchoKernel:
    """`ExpertKernel` that computes nothing."""

    def __init__(self, spec: ExpertSpec, num_slots: int, device: str) -> None:
        self.spec = spec
        self.num_slots = num_slots

    def write(self, slot: int, weights: ExpertWeights) -> None:
        pass

    def clear(self, slot: int) -> None:
        pass

    def run(self, x_TH: torch.Tensor, row_P: torch.Tensor, slot_P: torch.Tensor) -> torch.Tensor:
        return x_TH.index_select(0, row_P)


def hold_all(host: Host) -> None:
    """Make every expert ready."""
    host.configure(CONFIGURATION)
    nothing = torch.empty(0)
    for index in range(CONFIGURATION.layer_experts[0]):
        host.write(ExpertId(0, index), ExpertWeights(nothing, nothing))


if __name__ == "__main__":
    main(EchoKernel, hold_all)
