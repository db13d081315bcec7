"""A small random mixture of experts: its weights, the hosts that hold it by a placement, and the dense oracle.

Shapes: T tokens, K experts per token, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from expertmesh.hosts.configuration import HostConfiguration
from expertmesh.hosts.host import Host
from expertmesh.ids import ExpertId, HostId
from expertmesh.kernels.quantization import quantize
from expertmesh.kernels.reference import ReferenceKernel
from expertmesh.kernels.spec import Activation, ExpertSpec, ExpertWeights
from expertmesh.placement import HostInfo, Placement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SILU = Activation(name="silu")


def random_weights(spec: ExpertSpec, seed: int) -> ExpertWeights:
    """One expert whose output is about as large as its input, in the spec's format."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        scale = shape[-1] ** -0.5
        return torch.Tensor.to(torch.randn(shape, generator=generator) * scale, getattr(torch, spec.dtype))

    dense = ExpertWeights(
        w_in=draw(spec.rows_in, spec.hidden),
        w_out=draw(spec.hidden, spec.intermediate),
        b_in=draw(spec.rows_in) if spec.bias else None,
        b_out=draw(spec.hidden) if spec.bias else None,
    )
    return quantize(dense, spec)


@dataclass(frozen=True, slots=True)
class Mixture:
    """`num_layers` layers of `num_experts` random experts of one shape."""

    spec: ExpertSpec
    num_layers: int
    num_experts: int

    @property
    def configuration(self) -> HostConfiguration:
        return HostConfiguration(
            checkpoint="",
            specs=(self.spec,),
            layer_specs=(0,) * self.num_layers,
            layer_experts=(self.num_experts,) * self.num_layers,
        )

    def weights(self, expert: ExpertId) -> ExpertWeights:
        return random_weights(self.spec, seed=1 + expert.layer * self.num_experts + expert.index)

    def placement(self, held: Mapping[str, Sequence[ExpertId]], epoch: int = 1) -> Placement:
        """The placement in which each named host holds these experts."""
        hosts = tuple(HostInfo(id=HostId(name), address=name) for name in held)
        replicas: dict[ExpertId, tuple[HostId, ...]] = {}
        for name, experts in held.items():
            for expert in experts:
                replicas[expert] = (*replicas.get(expert, ()), HostId(name))
        num_experts = (self.num_experts,) * self.num_layers
        return Placement(epoch=epoch, hosts=hosts, num_experts=num_experts, replicas=replicas)

    def host(self, experts: Sequence[ExpertId]) -> Host:
        """A host that holds these experts, and has room for all."""
        host = Host(memory_bytes=2**40)
        host.configure(self.configuration)
        for expert in experts:
            host.write(expert, self.weights(expert))
        return host

    def hosts(self, placement: Placement) -> dict[HostId, Host]:
        """The hosts that a placement speaks of."""
        return {
            info.id: self.host([expert for expert, holders in placement.replicas.items() if info.id in holders])
            for info in placement.hosts
        }

    def dense(self, layer: int, x_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The layer's output by the dumb reference kernel and a sum in float32: the oracle, up to rounding."""
        kernel = ReferenceKernel(self.spec, self.num_experts)
        for index in range(self.num_experts):
            kernel.write(index, self.weights(ExpertId(layer, index)))
        num_tokens, num_choices = index_TK.shape
        slot_P, order = index_TK.reshape(-1).sort(stable=True)
        row_P = torch.arange(num_tokens).repeat_interleave(num_choices)
        y_PH = torch.empty(num_tokens * num_choices, x_TH.shape[1], dtype=x_TH.dtype)
        y_PH[order] = kernel.run(x_TH, row_P[order], slot_P)
        y_TKH = y_PH.view(num_tokens, num_choices, -1).float()
        return (y_TKH * weights_TK.float().unsqueeze(-1)).sum(1).to(x_TH.dtype)
