"""Which model a host is for: what the controller tells it before it can hold anything. A value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertmesh.checkpoint.recipe import CheckpointIndex
    from expertmesh.kernels.spec import ExpertSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfiguration:
    """The shapes of a model's experts and where they are read from."""

    checkpoint: str
    """A folder, a hub id, or "tiny"."""
    specs: tuple[ExpertSpec, ...]
    """The distinct shapes; nearly always one."""
    layer_specs: tuple[int, ...]
    """Per MoE layer, the index of its experts' shape."""
    layer_experts: tuple[int, ...]
    """Per MoE layer, how many experts it has."""

    @property
    def num_layers(self) -> int:
        return len(self.layer_specs)

    def spec(self, layer: int) -> ExpertSpec:
        return self.specs[self.layer_specs[layer]]

    def num_experts(self, spec: int) -> int:
        """How many experts the model has of the shape with this index."""
        return sum(n for n, of in zip(self.layer_experts, self.layer_specs, strict=True) if of == spec)


def configuration_for(index: CheckpointIndex, checkpoint: str) -> HostConfiguration:
    """What hosts must know of an indexed checkpoint."""
    specs = tuple(dict.fromkeys(index.specs))
    return HostConfiguration(
        checkpoint=checkpoint,
        specs=specs,
        layer_specs=tuple(specs.index(spec) for spec in index.specs),
        layer_experts=index.num_experts,
    )
