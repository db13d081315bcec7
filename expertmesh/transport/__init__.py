"""How rows reach a host and come back. One Protocol; `grpc_transport` over the network, `local` within the process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from expertmesh.placement import HostInfo


@dataclass(frozen=True, slots=True)
class LayerRequest:
    """Token rows of one layer for one host, and which of its experts each goes to. See protos/host.proto."""

    layer: int
    dtype: str
    rows: NDArray[np.uint8]
    """[t, hidden * itemsize] the rows' bytes, each row once."""
    pair_rows: NDArray[np.int32]
    experts: list[int]
    counts: list[int]


@dataclass(frozen=True, slots=True)
class LayerReply:
    """One result row per pair, in the pairs' order, neither weighted nor summed."""

    rows: NDArray[np.uint8]
    """[p, hidden * itemsize]"""
    compute_s: float


class Transport(Protocol):
    """Carries requests to hosts. Lives on one event loop; all calls are made on it."""

    async def call(self, host: HostInfo, request: LayerRequest) -> LayerReply:
        """Send and wait for the answer; cancelling gives up on it.

        Raises ReplicaUnavailableError when the host cannot be reached, breaks off or no longer holds an expert, and
        ReplicaFailedError when it answers with a failure. Never retries: that is the exchange's business.
        """
        ...

    async def close(self) -> None:
        """Break all connections; calls in progress raise ReplicaUnavailableError."""
        ...
