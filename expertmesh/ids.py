"""Names for the things that the two planes talk about. Values only; imports nothing of ours."""

from __future__ import annotations

from typing import NamedTuple, NewType

HostId = NewType("HostId", str)
"""Names one host process for its whole life; a host that is replaced gets a new id."""

MAX_LAYERS, MAX_EXPERTS = 4096, 2**16
"""MoE layers of a model, and experts of a layer: greater numbers are taken for a mistake, whoever sends them, before
anything is allocated by them."""


class ExpertId(NamedTuple):
    """One logical expert.

    `layer` counts the model's MoE layers from 0 in forward order (a dense layer has no number), `index` the experts
    of that layer from 0, as the gate numbers them.
    """

    layer: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on an id

    def __str__(self) -> str:
        return f"{self.layer}:{self.index}"
