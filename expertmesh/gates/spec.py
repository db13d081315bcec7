"""`GateSpec`: which gate a layer, or every layer of a model, uses, as one checked value.

Knows what each strategy is told (`strategies`), not how it chooses, and needs no torch. Invariant: a GateSpec that
exists can be used; what cannot work raises ConfigError where it is made, in one line that names the field and the fix.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from expertmesh.errors import ConfigError, check_known
from expertmesh.gates.strategies import STRATEGIES, Strategy

GROUP_SCORES = ("max", "top2")
"""What a group of experts is judged by: its best expert (DeepSeek-V2, arXiv 2405.04434, section 2.2.2), or the sum of
its best two (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

OVERFLOWS = ("drop", "next-best", "error")
"""What becomes of a choice whose expert is full: it leads nowhere, so that the residual alone carries the token
("drop": Switch Transformers, section 2.2); it goes to the token's next best expert with room ("next-best": "No Token
Left Behind", appendix B there); or ConfigError is raised ("error")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Group-limited selection: the experts in order are `num` equal groups, and a token may use `kept` of them.

    Meant for groups that share a machine, so that a token's row travels to few machines.
    """

    num: int
    kept: int
    score: str = "max"
    """One of GROUP_SCORES."""


def expert_capacity(num_tokens: int, num_experts: int, k: int, factor: float) -> int:
    """The capacity of each expert: its even share of the choices times `factor`, rounded up, at least one.

    Fedus et al. (arXiv 2101.03961, equation 3) with k choices instead of one. Rounding up gives a lone token, as in
    decoding, its experts. Raises ConfigError for a factor that leaves no capacity at all.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ConfigError(
            f"gate.capacity_factor {factor:g} gives a capacity below one token: use a number above 0, commonly 1 to 2"
        )
    return max(1, math.ceil(factor * k * num_tokens / num_experts))


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSpec:
    """One of `STRATEGIES` and what it is told. A field that the strategy has no use for is refused."""

    strategy: str
    num_experts: int | None = None
    """Of the layer. None leaves it open, and unchecked what depends on it, until `for_layer`."""
    k: int | None = None
    """Experts for each token; with top-p and threshold, the most."""
    normalize: bool = False
    """Whether a token's weights sum to one."""
    scale: float = 1.0
    """What weights are multiplied by, after that."""
    num_groups: int = 1
    groups_kept: int = 1
    """Of the groups of experts, how many a token may use."""
    group_score: str = "max"
    """One of GROUP_SCORES."""
    top_p: float | None = None
    """The probability that a token's experts have together."""
    ratio: float | None = None
    """The probability that an expert must have, over the best one's of the token."""
    capacity_factor: float | None = None
    """What an expert has room for, over its even share of the choices. None: no limit."""
    overflow: str = "drop"
    """One of OVERFLOWS."""
    by_confidence: bool = False
    """Whether the tokens that the gate is surest of get the room, not those that stand first."""
    random_second: bool = False
    """Whether the second expert is taken at random, the likelier the more it weighs."""

    def __post_init__(self) -> None:
        check_known("gate.strategy", self.strategy, STRATEGIES)
        check_known("gate.group_score", self.group_score, GROUP_SCORES)
        check_known("gate.overflow", self.overflow, OVERFLOWS)
        if self.num_experts is not None:
            _at_least_one("num_experts", self.num_experts)
        self._check_fields(STRATEGIES[self.strategy])
        self._check_k()
        self._check_groups()
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"gate.top_p is {self.top_p:g}: use a probability above 0 and at most 1")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ConfigError(f"gate.ratio is {self.ratio:g}: use a number above 0 and at most 1")
        if self.capacity_factor is not None:
            expert_capacity(1, 1, 1, self.capacity_factor)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"gate.scale is {self.scale:g}: use a number above 0, 1 for weights as they are")

    def for_layer(self, num_experts: int) -> GateSpec:
        """The same gate for a layer of so many experts. Raises ConfigError where it cannot be."""
        if self.num_experts not in (None, num_experts):
            raise ConfigError(
                f"gate.num_experts is {self.num_experts}, but the layer has {num_experts}: use {num_experts}"
            )
        return self if self.num_experts == num_experts else dataclasses.replace(self, num_experts=num_experts)

    @property
    def groups(self) -> Groups | None:
        """The groups, or None where every expert may be chosen."""
        if self.groups_kept == self.num_groups:
            return None
        return Groups(num=self.num_groups, kept=self.groups_kept, score=self.group_score)

    @property
    def is_alone(self) -> bool:
        """Whether a token's experts depend on nothing but itself, so that its answer is the same in every batch."""
        return self.why_not_alone is None

    @property
    def why_not_alone(self) -> str | None:
        """The field by which a token's experts come to depend on more than itself, in words; None if they do not."""
        if self.random_second:
            return "gate.random_second draws a token's experts at random"
        if STRATEGIES[self.strategy].is_alone or self.capacity_factor is None:
            return None
        return f"gate.capacity_factor of {self.strategy} makes a token's experts depend on the others of its batch"

    def capacity(self, num_tokens: int) -> int | None:
        """How many of `num_tokens` tokens an expert of the layer has room for; None for no limit."""
        if self.capacity_factor is None:
            return None
        assert self.num_experts is not None, "a gate for no layer in particular has no capacity"
        k = STRATEGIES[self.strategy].fixed_k or 1
        return expert_capacity(num_tokens, self.num_experts, k, self.capacity_factor)

    def _check_fields(self, strategy: Strategy) -> None:
        """Everything needed is there, and nothing without a use."""
        for name in strategy.needs:
            if getattr(self, name) is None:
                raise ConfigError(f"gate.{name} is missing: the strategy {self.strategy} needs it")
        usable = {"strategy", "num_experts", *strategy.needs, *strategy.takes}
        for field in dataclasses.fields(self):
            if field.name not in usable and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"gate.{field.name} has no meaning for the strategy {self.strategy}: remove it, or use"
                    f" {_those_that_take(field.name)}"
                )

    def _check_k(self) -> None:
        k = STRATEGIES[self.strategy].fixed_k if self.k is None else self.k
        if k is None:
            return
        _at_least_one("k", k)
        if self.num_experts is not None and k > self.num_experts:
            what = f"gate.k is {k}" if self.k is not None else f"gate.strategy {self.strategy} takes {k} for each token"
            raise ConfigError(f"{what}, but the layer has {self.num_experts} experts: use at most as many")

    def _check_groups(self) -> None:
        _at_least_one("num_groups", self.num_groups)
        _at_least_one("groups_kept", self.groups_kept)
        if self.groups_kept > self.num_groups:
            raise ConfigError(
                f"gate.groups_kept is {self.groups_kept} of {self.num_groups} groups: use at most as many"
            )
        if self.num_experts is None:
            return
        size, rest = divmod(self.num_experts, self.num_groups)
        if rest:
            raise ConfigError(
                f"gate.num_groups {self.num_groups} does not divide the layer's {self.num_experts} experts:"
                f" use {_nearest_divisor(self.num_experts, self.num_groups)}"
            )
        if self.k is not None and self.k > self.groups_kept * size:
            raise ConfigError(
                f"gate.k is {self.k}, but gate.groups_kept {self.groups_kept} leaves {self.groups_kept * size} experts"
                f" to choose from: keep {-(-self.k // size)} groups or more"
            )
        if self.group_score == "top2" and size < 2:
            raise ConfigError("gate.group_score is top2, but a group has one expert: use max, or fewer num_groups")


def _at_least_one(field: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"gate.{field} is {value}: use at least 1")


def _those_that_take(field: str) -> str:
    names = [name for name, strategy in STRATEGIES.items() if field in (*strategy.needs, *strategy.takes)]
    return " or ".join(names)


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return min(divisors, key=lambda n: abs(n - wanted))
