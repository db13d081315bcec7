"""Which fault is due, and whom it hits. Pure: the time and what is seen of the mesh come in, shots come out.

Everything random is drawn from the script's seed, for each step on its own, and the same number of draws for each shot
whatever the mesh looks like: a run that is repeated differs only where the mesh does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertmesh.chaos.look import Look
    from expertmesh.chaos.script import Script, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """A step whose moment has come."""

    step: int
    """Its number in the script."""
    turn: int
    """How often it has come before."""
    targets: tuple[str, ...]
    """Hosts' ids; or `router`, or `controller`, or none for an order to the mesh."""
    seed: int
    """Of what the fault itself draws."""


@dataclass(slots=True)
class _Course:
    """How far a step has come."""

    step: Step
    rng: random.Random
    turn: int = 0
    planned_s: float = 0.0
    due_s: float = 0.0
    """As planned, and the jitter."""
    waits_since_s: float | None = None
    """Since when it has been due and could not be."""
    is_done: bool = False
    draws: tuple[float, int] = (0.0, 0)
    """For the next shot: which of the candidates, and the fault's own seed."""

    def prepare(self, planned_s: float) -> None:
        """Draw what the next shot needs."""
        self.planned_s = planned_s
        self.due_s = planned_s + self.rng.random() * self.step.jitter
        self.draws = self.rng.random(), self.rng.getrandbits(32)
        self.waits_since_s = None


@dataclass(slots=True)
class Schedule:
    """The steps of one run. Times are seconds since the load is steady."""

    script: Script
    seed: int
    _courses: list[_Course] = field(init=False)

    def __post_init__(self) -> None:
        steps = enumerate(self.script.steps)
        self._courses = [_Course(step, random.Random(f"{self.seed}/{number}")) for number, step in steps]
        for course in self._courses:
            course.prepare(course.step.at)

    def due(self, now_s: float, look: Look) -> list[Shot]:
        """The shots of this moment. To be called again and again, each time with the latest look."""
        shots = []
        for number, course in enumerate(self._courses):
            if course.is_done or now_s < course.due_s:
                continue
            targets = self._targets(course, look)
            if targets is None:
                course.waits_since_s = now_s if course.waits_since_s is None else course.waits_since_s
                continue
            shots.append(Shot(step=number, turn=course.turn, targets=targets, seed=course.draws[1]))
            self._go_on(course, now_s)
            if course.step.is_deadly:
                break  # what the others are to hit is to be seen after this
        return shots

    def _targets(self, course: _Course, look: Look) -> tuple[str, ...] | None:
        """Whom the shot hits; None: not now."""
        step = course.step
        if step.when is not None and not look.holds(step.when):
            return None
        if step.scale is not None:
            return ()
        if step.target in ("router", "controller"):
            return (step.target,)
        if step.target == "every host":
            return tuple(look.ready) or None
        if step.target.startswith("host "):
            name = step.target.removeprefix("host ")
            return (name,) if name in look.ready else None
        if step.target == "node":
            nodes = look.other_nodes
            return look.hosts_of(nodes[int(course.draws[0] * len(nodes))]) if nodes else None
        candidates: Sequence[str] = look.sole_holders if step.target == "sole holder" else look.ready
        return (candidates[int(course.draws[0] * len(candidates))],) if candidates else None

    def _go_on(self, course: _Course, now_s: float) -> None:
        step = course.step
        course.turn += 1
        if not step.repeats or course.turn == step.times:
            course.is_done = True
        elif step.every is not None:
            next_s = course.planned_s + step.every
            # What had to wait does not come in a burst later.
            course.prepare(next_s if next_s > now_s else now_s + step.every)
        else:
            course.prepare(now_s)

    @property
    def is_done(self) -> bool:
        """Whether no step has anything left to do."""
        return all(course.is_done for course in self._courses)

    def missed(self) -> str | None:
        """What was to come once, and has not, now that the time is over."""
        for number, course in enumerate(self._courses):
            if not course.is_done and not course.step.repeats and course.due_s < (self.script.duration or 0.0):
                return f"step {number}, due at {course.due_s:.1f} s, never came"
        return None

    def stuck(self, now_s: float) -> str | None:
        """What has been waiting for longer than the script is patient."""
        for number, course in enumerate(self._courses):
            since_s = course.waits_since_s
            if not course.is_done and since_s is not None and now_s - since_s > self.script.patience:
                what = course.step.when or course.step.target
                return f"step {number}, turn {course.turn}: waited {now_s - since_s:.0f} s for {what!r}, in vain"
        return None
