"""Which optimiser hosts use on the experts that they train: a checked value. Needs no torch.

The algorithms are torch.optim's, and the fields mean what they mean there. Invariant: an Optimizer that exists works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from expertmesh.errors import ConfigError, check_known

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """SGD with momentum, or AdamW (Loshchilov and Hutter, arXiv 1711.05101). Raises ConfigError for what cannot be."""

    name: str = "adamw"
    """One of OPTIMIZERS."""
    momentum: float = 0.0
    """Of sgd alone."""
    beta1: float = 0.9
    """This one and the next two: of adamw alone."""
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_known("optimizer.name", self.name, OPTIMIZERS)
        for field in ("momentum", "beta1", "beta2"):
            if not 0 <= (value := getattr(self, field)) < 1:
                raise ConfigError(f"optimizer.{field} is {value:g}: use a number from 0 to below 1")
        for field in ("epsilon", "weight_decay"):
            if not 0 <= (value := getattr(self, field)) < math.inf:
                raise ConfigError(f"optimizer.{field} is {value:g}: use a finite number, 0 or above")

    @property
    def state(self) -> tuple[str, ...]:
        """What it keeps for each tensor, by torch.optim's names."""
        if self.name == "adamw":
            return ("step", "exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def num_copies(self) -> int:
        """Float32 numbers kept for each weight: itself, its gradient, and the state of its size."""
        return 2 + sum(name != "step" for name in self.state)


def check_learning_rate(rate: float) -> float:
    """The rate, if a step can be taken with it. Raises ConfigError."""
    if not 0 <= rate < math.inf:
        raise ConfigError(f"learning rate {rate:g}: use a finite number, 0 or above")
    return rate
