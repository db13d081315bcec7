"""A host: the replicas on one device, and the launches that compute them. Knows nothing of gRPC or Ray.

Requests that arrive together share one launch per pool, whatever layer or router they come from; what a request gets
back does not depend on that. Not thread-safe: one thread, or one event loop, uses it.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from expertmesh.errors import ConfigError
from expertmesh.hosts.slots import SlotPool
from expertmesh.hosts.statistics import HostStatistics, LaunchCounter
from expertmesh.kernels import make_kernel, slot_bytes
from expertmesh.transport import LayerReply, LayerRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.ids import ExpertId
    from expertmesh.kernels import ExpertKernel
    from expertmesh.kernels.spec import ExpertSpec, ExpertWeights


class MakeKernel(Protocol):
    """How a host gets the kernel of a pool; benches bring their own."""

    def __call__(self, spec: ExpertSpec, num_slots: int, device: str) -> ExpertKernel: ...


class Work(NamedTuple):
    """A request whose experts have been found."""

    request: LayerRequest
    pool: int
    slots: list[int]
    """[e] the slot of each expert of the request."""


class Host:
    """Holds replicas within `memory_bytes` of `device` and computes pairs of (row, expert)."""

    def __init__(self, memory_bytes: int, device: str = "cpu", make: MakeKernel = make_kernel) -> None:
        self.memory_bytes = memory_bytes
        self.configuration: HostConfiguration | None = None
        self.device = device
        self._make = make
        self._pools: tuple[SlotPool, ...] = ()
        self._done = LaunchCounter()

    def configure(self, configuration: HostConfiguration) -> tuple[int, ...]:
        """Make empty pools for a model, and forget any before: the number of slots of each.

        Memory is divided among shapes by what all their experts would take. Raises ConfigError when it holds none.
        """
        for spec in configuration.specs:
            # To learn what a slot takes packed, one is packed: only where that can fit.
            if spec.num_bytes > self.memory_bytes:
                raise self._too_small(spec.num_bytes)
        sizes = [self.bytes_per_slot(spec) for spec in configuration.specs]
        needs = [configuration.num_experts(i) * size for i, size in enumerate(sizes)]
        share = min(1.0, self.memory_bytes / sum(needs))
        slots = tuple(int(configuration.num_experts(i) * share) for i in range(len(needs)))
        if not all(slots):
            raise self._too_small(max(sizes))
        self._pools = ()
        self._pools = tuple(
            SlotPool(self._make(spec, n, self.device)) for spec, n in zip(configuration.specs, slots, strict=True)
        )
        self.configuration = configuration
        return slots

    def _too_small(self, slot: int) -> ConfigError:
        memory = f"memory of {self.memory_bytes:,} bytes"
        return ConfigError(f"a host with {memory} holds no expert: one takes {slot:,} bytes")

    def bytes_per_slot(self, spec: ExpertSpec) -> int:
        """What one expert takes on this host's device, packing included."""
        return slot_bytes(spec, self.device)

    def _pool(self, layer: int) -> SlotPool:
        assert self.configuration is not None
        return self._pools[self.configuration.layer_specs[layer]]

    def holds(self, expert: ExpertId) -> bool:
        return self.configuration is not None and expert in self._pool(expert.layer)

    def write(self, expert: ExpertId, weights: ExpertWeights) -> None:
        """Make a replica ready. Raises OutOfSlotsError."""
        self._pool(expert.layer).write(expert, weights)

    def drop(self, expert: ExpertId) -> None:
        """Free a replica's slot. Idempotent."""
        self._pool(expert.layer).drop(expert)

    def answer(self, expert: ExpertId, x_RH: torch.Tensor) -> torch.Tensor:
        """A replica's y_RH for rows that count for no one's load. Raises NotHeldError."""
        pool = self._pool(expert.layer)
        (slot,) = pool.slots_of(expert.layer, [expert.index])
        return pool.kernel.run(x_RH, torch.arange(len(x_RH)), torch.full((len(x_RH),), slot))

    def prepare(self, request: LayerRequest) -> Work:
        """Find the slots that a request needs. Raises NotHeldError."""
        assert self.configuration is not None
        pool = self.configuration.layer_specs[request.layer]
        return Work(request, pool, self._pools[pool].slots_of(request.layer, request.experts))

    def compute(self, works: Sequence[Work]) -> list[LayerReply]:
        """Answer all of `works`, in order, with one launch per pool that they need."""
        pools = {work.pool for work in works}
        if len(pools) == 1:
            return self._launch(self._pools[works[0].pool], works)
        replies: dict[int, LayerReply] = {}
        for pool in pools:
            chosen = [i for i, work in enumerate(works) if work.pool == pool]
            replies |= zip(chosen, self._launch(self._pools[pool], [works[i] for i in chosen]), strict=True)
        return [replies[i] for i in range(len(works))]

    def _launch(self, pool: SlotPool, works: Sequence[Work]) -> list[LayerReply]:
        x_TB, row_P, slot_P = _joined(works)
        # The pairs of one request come grouped by expert; those of several may share some.
        by_slot = np.argsort(slot_P, kind="stable") if len(works) > 1 else None
        if by_slot is not None:
            row_P, slot_P = row_P[by_slot], slot_P[by_slot]

        started = time.perf_counter()
        x_TH = torch.from_numpy(x_TB).view(pool.dtype)
        y_PH = pool.kernel.run(x_TH, torch.from_numpy(row_P), torch.from_numpy(slot_P))
        took_s = time.perf_counter() - started

        y_PB = y_PH.view(torch.uint8).numpy()
        for work in works:
            pool.count(work.slots, work.request.counts)
        num_experts = len(works[0].slots) if len(works) == 1 else len(np.unique(slot_P))
        self._done.add(num_experts, len(row_P), took_s)
        if by_slot is None:
            return [LayerReply(y_PB, took_s)]
        y_PB = y_PB[np.argsort(by_slot, kind="stable")]
        ends = itertools.accumulate(len(work.request.pair_rows) for work in works)
        return [LayerReply(y_PB[start:end], took_s) for start, end in itertools.pairwise([0, *ends])]

    def statistics(self) -> HostStatistics:
        return HostStatistics(
            slots=tuple(pool.kernel.num_slots for pool in self._pools),
            memory_bytes=self.memory_bytes,
            replicas=tuple(load for pool in self._pools for load in pool.loads()),
            done=self._done.sums(),
            at_s=time.monotonic(),
        )


def _joined(works: Sequence[Work]) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """The rows of all works one after the other, and for each pair its row there and its slot."""
    if len(works) == 1:
        request = works[0].request
        rows = request.rows if request.rows.flags.writeable else request.rows.copy()  # torch takes no other
        slots = works[0].slots
        num_pairs = len(request.pair_rows)
        slot_P = np.full(num_pairs, slots[0]) if len(slots) == 1 else np.array(slots).repeat(request.counts)
        return rows, request.pair_rows.astype(np.int64, copy=False), slot_P
    x_TB = np.concatenate([work.request.rows for work in works])
    starts = itertools.accumulate((len(work.request.rows) for work in works[:-1]), initial=0)
    row_P = np.concatenate(
        [np.add(work.request.pair_rows, start, dtype=np.int64) for work, start in zip(works, starts, strict=True)]
    )
    slot_P = np.concatenate([np.repeat(work.slots, work.request.counts) for work in works])
    return x_TB, row_P, slot_P
