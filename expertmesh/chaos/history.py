"""What happened in a run: values, from which oracles judge and reports are made. All times are of one clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expertmesh.bench.crowd import Answer
    from expertmesh.chaos.script import Script


DEAD_S = 0.2
"""So long after a deadly fault was asked for, its victim is dead."""


@dataclass(slots=True, kw_only=True)
class Strike:
    """One fault, as it was done to one target."""

    step: int
    turn: int
    kinds: tuple[str, ...]
    target: str
    at_s: float
    deadly: bool
    lasts: bool = False
    """Whether it goes on, and hits again and again."""
    hosts: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()
    """Of the processes that must end or stop by it, where they can be seen."""
    victim: str = ""
    """What it was before."""
    until_s: float = float("inf")
    """When it ends by itself."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """How often its kinds had fired on the target before."""
    proof: str = ""
    """That it really happened; nothing as long as that is open."""
    problem: str = ""
    """Why it can no longer be proven."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A whole run."""

    script: Script
    seed: int
    answers: Sequence[Answer]
    right: Mapping[str, Sequence[int]]
    """To each prompt, the undisturbed answer."""
    strikes: Sequence[Strike]
    steady_from_s: float
    faults_from_s: float
    """Until here nothing was disturbed."""
    ended_s: float
    looks: Sequence[tuple[float, bool, bool]]
    """When each was begun; whether the mesh was covered then, and whole."""
    settled_s: float | None
    """How long after the last fault the mesh was whole, for good; None: it was not."""
    unsettled: str = ""
    """What was wrong with it then."""
    footprints: Sequence[tuple[float, Mapping[str, Mapping[str, float]]]] = ()
    stuck: str = ""
    """What the script could not do."""
    starts_s: Sequence[float] = ()
    """Of each host that came: how long its start and its first loads took."""

    @property
    def gaps_s(self) -> list[tuple[float, float]]:
        """Of all answers: when a token came, and how long after the one before."""
        return [gap for answer in self.answers for gap in answer.gaps_s]

    @property
    def steady_gaps_s(self) -> list[float]:
        """Those before the first fault."""
        return [gap for at_s, gap in self.gaps_s if self.steady_from_s <= at_s - gap and at_s < self.faults_from_s]

    @property
    def moments(self) -> list[Strike]:
        """The strikes, those that came together counted once."""
        seen: dict[tuple[int, int], Strike] = {}
        for strike in self.strikes:
            seen.setdefault((strike.step, strike.turn), strike)
        return sorted(seen.values(), key=lambda strike: strike.at_s)

    def stalls_s(self, within_s: float = 10.0) -> list[float]:
        """Of each moment: the longest gap that reaches into the time after it, above what is usual; at least 0."""
        usual_s = quantile(self.steady_gaps_s, 0.99)
        gaps = sorted(self.gaps_s)
        moments = self.moments
        stalls = []
        for number, strike in enumerate(moments):
            next_s = moments[number + 1].at_s if number + 1 < len(moments) else self.ended_s
            end_s = min(next_s, strike.at_s + within_s)
            longest_s = max((gap for at_s, gap in gaps if at_s >= strike.at_s and at_s - gap < end_s), default=0.0)
            stalls.append(max(0.0, longest_s - usual_s))
        return stalls

    def recoveries_s(self) -> list[float | None]:
        """Of each deadly strike on hosts: how long until the mesh was covered again; None: it never was."""
        return [None if covered_s is None else covered_s - death_s for death_s, covered_s in self._deaths()]

    def last_recoveries_s(self) -> list[float | None]:
        """The same of those alone that were followed by no other before the mesh was covered again."""
        last_s = {covered_s: death_s for death_s, covered_s in self._deaths()}
        return [None if covered_s is None else covered_s - death_s for covered_s, death_s in last_s.items()]

    def _deaths(self) -> list[tuple[float, float | None]]:
        """When hosts were killed, in order, and when the mesh was covered again; None: it never was."""
        covered = [began_s for began_s, is_covered, _ in self.looks if is_covered]
        return [
            (strike.at_s, next((began_s for began_s in covered if began_s > strike.at_s + DEAD_S), None))
            for strike in self.moments
            if strike.deadly and strike.hosts
        ]

    def tokens_per_second(self, from_s: float, to_s: float) -> float:
        """What all clients together got."""
        count = sum(from_s <= at_s < to_s for answer in self.answers for at_s in answer.times_s)
        return count / max(to_s - from_s, 1e-9)


def quantile(samples: Sequence[float], part: float) -> float:
    """The sample that this part of them does not exceed; 0 of none."""
    if not samples:
        return 0.0
    ordered = sorted(samples)
    return ordered[round(part * (len(ordered) - 1))]
