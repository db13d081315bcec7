"""What can be made to go wrong on purpose, as a value. Knows nothing of how it is done, or to whom."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from expertmesh.errors import ConfigError


class FaultKind(StrEnum):
    """The faults of protos/host.proto, by their names in scripts and orders."""

    SLOW = "slow"
    """Launches take `factor` times as long."""
    DROP_REQUEST = "drop_request"
    """Requests vanish before they are computed."""
    DROP_REPLY = "drop_reply"
    """Replies vanish after they were computed."""
    DUPLICATE_REPLY = "duplicate_reply"
    """Replies come twice."""
    CORRUPT = "corrupt"
    """A row of a launch comes back with wrong numbers, all of them finite."""
    NOT_FINITE = "not_finite"
    """A row of a launch comes back with a NaN in it."""
    FAIL_LOAD = "fail_load"
    """Loads fail."""
    SILENCE = "silence"
    """Nothing is read and nothing is answered, over connections that stay open."""
    PAUSE = "pause"
    """The process is stopped for `seconds`."""
    KILL = "kill"
    """The process is killed."""
    KILL_NODE = "kill_node"
    """The process's parent is killed, which takes all of Ray's processes on the machine along."""


NOT_ALLOWED = "faults: this mesh was not started to be broken; say `faults: true` in its config"

AT_ONCE = frozenset({FaultKind.PAUSE, FaultKind.KILL, FaultKind.KILL_NODE})
"""Those that happen once, when they are asked for; the others last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. Raises ConfigError for what cannot be."""

    kind: FaultKind
    share: float = 1.0
    """Of the messages, launches or loads that it hits, drawn at random."""
    factor: float = 1.0
    """SLOW: how many times as long."""
    seconds: float = 0.0
    """After so long it ends by itself; 0: it stays until others replace it."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share: {self.share} is not above 0 and at most 1")
        if not 0 <= self.seconds < math.inf:
            raise ConfigError(f"seconds: {self.seconds} is below 0 or endless")
        if self.kind is FaultKind.SLOW and not 1 < self.factor < math.inf:
            raise ConfigError(f"factor: {self.factor} makes nothing slow; it must be above 1")
        if self.kind is FaultKind.PAUSE and not self.seconds:
            raise ConfigError("seconds: a pause needs some, or it would never end")

    def to_json(self) -> dict[str, Any]:
        """As an order carries it."""
        return asdict(self)
