"""How rows reach a host and come back. One Protocol; `network` between processes, `local` within one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from expertmesh.errors import ReplicaFailedError, ReplicaUnavailableError
    from expertmesh.placement import HostInfo


class LayerRequest(NamedTuple):
    """Token rows of one layer for one host, and which of its experts each goes to. See protos/host.proto."""

    layer: int
    dtype: str
    rows: NDArray[np.uint8]
    """[t, hidden * itemsize] the rows' bytes, each row once."""
    pair_rows: NDArray[np.int32 | np.int64]
    experts: list[int]
    counts: list[int]


class LayerReply(NamedTuple):
    """One result row per pair, in the pairs' order, neither weighted nor summed."""

    rows: NDArray[np.uint8]
    """[p, hidden * itemsize]"""
    compute_s: float


class Answer(NamedTuple):
    """What became of one request."""

    ticket: int
    outcome: LayerReply | ReplicaUnavailableError | ReplicaFailedError
    """ReplicaUnavailableError: the host could not be reached, broke off, or holds an expert no longer.
    ReplicaFailedError: it answered with a failure."""


class Transport(Protocol):
    """Carries requests to hosts: many under way at once, answers in any order, each at most once.

    Used by one thread, but for `wake`. Never retries: that is the exchange's business.
    """

    def send(self, host: HostInfo, request: LayerRequest) -> int:
        """Send, without waiting. Returns the ticket that its answer will carry; never raises for the host's sake."""
        ...

    def receive(self, timeout_s: float) -> list[Answer]:
        """The answers that have come, waiting for the first; none after `timeout_s`, or when woken. Their rows may be
        read until the next `receive`, and are not to be trusted to stay what they are: keep a copy, and check that."""
        ...

    def forget(self, ticket: int) -> None:
        """Give up on an answer: should it come, it is thrown away."""
        ...

    def wake(self) -> None:
        """Make a `receive` that waits now, or else the next one, return early. From any thread."""
        ...

    def close(self) -> None:
        """Break all connections. Idempotent."""
        ...
