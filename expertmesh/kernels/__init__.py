"""The expert FFN over a pool of slots: one interface, and the choice of an implementation for a device.

`kernel.run(x_TH, row_P, slot_P) -> y_PH` computes each (token row, expert) pair. The invariant that the whole product
stands on: **a pair's result never depends on what else is in the call** - not on the number of rows, their order, or
the other experts - so the answer is the same bit for bit however rows are batched, split or re-sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from expertmesh.kernels.spec import ExpertSpec, ExpertWeights


class ExpertKernel(Protocol):
    """Owns the memory of `num_slots` experts of one spec on one device. Not thread-safe: one thread uses it.

    Shapes: T token rows, H hidden, P (row, expert) pairs.
    """

    spec: ExpertSpec
    num_slots: int

    def write(self, slot: int, weights: ExpertWeights) -> None:
        """Copy one expert into `slot` (packing it for the device as needed), replacing what was there."""
        ...

    def clear(self, slot: int) -> None:
        """Forget the expert in `slot`, freeing what can be freed."""
        ...

    def run(self, x_TH: torch.Tensor, row_P: torch.Tensor, slot_P: torch.Tensor) -> torch.Tensor:
        """Compute `y_PH[p] = expert(slot_P[p])(x_TH[row_P[p]])`.

        x_TH is contiguous, on CPU, in the spec's dtype; row_P and slot_P are int64 on CPU. The pairs of a slot come
        together, and every slot named has been written. The result is on CPU, in the spec's dtype, unweighted and
        unsummed.
        """
        ...


def make_kernel(spec: ExpertSpec, num_slots: int, device: str = "cpu") -> ExpertKernel:
    """The fastest kernel for `device` ("cpu" or "cuda[:N]"). Imports triton only when it is asked for."""
    if device == "cpu":
        from expertmesh.kernels.cpu import CpuKernel

        return CpuKernel(spec, num_slots)
    from expertmesh.kernels.triton_kernel import TritonKernel

    return TritonKernel(spec, num_slots, device)


def slot_bytes(spec: ExpertSpec, device: str = "cpu") -> int:
    """Bytes of memory that one written slot takes on `device`: what a host divides its memory by.

    On a CPU that is not `spec.num_bytes`: weights may be held in float32 and padded, as the arithmetic chosen for this
    machine wants them. The first call for a spec makes that choice, in milliseconds to seconds.
    """
    if device != "cpu":
        return spec.num_bytes
    import torch

    from expertmesh.kernels.cpu import choose_arithmetic

    return choose_arithmetic(spec, torch.get_num_threads())[1]
