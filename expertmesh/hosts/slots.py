"""A pool of equal slots: the memory of one device for experts of one shape, and which expert is in which slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expertmesh.errors import NotHeldError, OutOfSlotsError
from expertmesh.ids import ExpertId

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expertmesh.kernels import ExpertKernel
    from expertmesh.kernels.spec import ExpertWeights


class SlotPool:
    """Slots of one kernel, like the pages of a cache. An expert is in one slot at most."""

    def __init__(self, kernel: ExpertKernel) -> None:
        self.kernel = kernel
        self.dtype: torch.dtype = getattr(torch, kernel.spec.dtype)
        self._slot: dict[tuple[int, int], int] = {}
        self._free = list(range(kernel.num_slots))[::-1]
        self._rows = [0] * kernel.num_slots

    def write(self, expert: ExpertId, weights: ExpertWeights) -> None:
        """Put an expert into a free slot, or renew it in its own. Raises OutOfSlotsError when there is none."""
        slot = self._slot.get(expert)
        if slot is None:
            if not self._free:
                raise OutOfSlotsError(f"no free slot for expert {expert}: all {self.kernel.num_slots} hold replicas")
            slot = self._free.pop()
        self.kernel.write(slot, weights)
        self._rows[slot] = 0
        self._slot[expert] = slot

    def drop(self, expert: ExpertId) -> None:
        """Free an expert's slot; nothing happens if it has none."""
        slot = self._slot.pop(expert, None)
        if slot is not None:
            self.kernel.clear(slot)
            self._free.append(slot)

    def slots_of(self, layer: int, experts: list[int]) -> list[int]:
        """The slot of each expert of a layer. Raises NotHeldError for the first that has none."""
        try:
            return [self._slot[layer, index] for index in experts]
        except KeyError as error:
            raise NotHeldError(ExpertId(*error.args[0])) from None

    def count(self, slots: list[int], rows: list[int]) -> None:
        """Note that `rows[i]` pairs were computed by `slots[i]`."""
        for slot, number in zip(slots, rows, strict=True):
            self._rows[slot] += number

    def loads(self) -> Iterator[tuple[ExpertId, int]]:
        """Each expert held, with the pairs computed since it was written."""
        for expert, slot in sorted(self._slot.items()):
            yield ExpertId(*expert), self._rows[slot]

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._slot

    def __len__(self) -> int:
        return len(self._slot)
