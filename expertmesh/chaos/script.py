"""Fault scripts: YAML that says which mesh, under which load, which faults when, and what must hold all the while.

Knows nothing of how a fault is done. Sections are frozen and refuse unknown keys, as in `config`. Its invariant: of two
runs of one script with one seed, the n-th fault of each step is drawn alike.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from expertmesh.config import Section, describe
from expertmesh.errors import ConfigError
from expertmesh.fault import AT_ONCE, Fault, FaultKind

SHIPPED = Path(__file__).parent / "scripts"

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def _parse_seconds(value: Any) -> Any:
    """`500ms`, `5s`, `3m`, or a number of seconds."""
    if isinstance(value, str):
        if not (match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h)", value.strip())):
            raise ValueError(f"{value!r} is no duration; write 500ms, 5s, 3m or 1h")
        return float(match[1]) * _UNITS[match[2]]
    return value


Seconds = Annotated[
    float, BeforeValidator(_parse_seconds), Field(ge=0, le=1e6), PlainSerializer(lambda s: f"{s:g}s", when_used="json")
]

Condition = Literal["covered", "whole", "moving"]
"""`covered`: every expert has as many ready replicas as it should. `whole`: besides, there are as many hosts and
routers as there should be. `moving`: replicas are being loaded, or hosts started or drained."""


class FaultSection(Section):
    """One fault."""

    kind: FaultKind
    share: float = Field(default=1.0, gt=0, le=1)
    """Of the messages, launches or loads that it hits."""
    factor: float = 1.0
    """For `slow`: how many times as long."""
    seconds: Seconds = 0.0
    """After so long it ends by itself; 0: it stays until this host gets others."""

    @property
    def value(self) -> Fault:
        return Fault(kind=self.kind, share=self.share, factor=self.factor, seconds=self.seconds)

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        try:
            _ = self.value
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


class ScaleSection(Section):
    """An order instead of a fault: to have something to break."""

    pool: str = "cpu"
    hosts: int = Field(ge=0)


class Step(Section):
    """Something that happens, once or again and again."""

    target: str = "random host"
    """`random host`, `sole holder` (of some expert's only replica), `every host`, `host NAME`, `node` (all hosts of
    one), `router`, `controller`."""
    faults: tuple[FaultSection, ...] = ()
    """At the same time, on the same target, in place of those that it had."""
    scale: ScaleSection | None = None
    at: Seconds = 0.0
    """The first moment, since the load is steady."""
    every: Seconds | None = None
    """From then on again, each so much after the last was due."""
    when: Condition | None = None
    """Not before this holds; without `every`, again as soon as it holds again."""
    jitter: Seconds = 0.0
    """Each time later by up to so much, drawn at random."""
    times: int | None = Field(default=None, ge=1)
    """How often; by default once, or with `every` or `when` until the duration is over."""

    @property
    def repeats(self) -> bool:
        return self.every is not None or self.when is not None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if bool(self.faults) == bool(self.scale):
            raise ValueError("a step has either faults or scale")
        kinds = [fault.kind for fault in self.faults]
        if len(set(kinds)) != len(kinds):
            raise ValueError("faults: each kind once")
        if len(kinds) > 1 and AT_ONCE & set(kinds):
            raise ValueError(f"faults: {', '.join(sorted(AT_ONCE & set(kinds)))} must be alone in its step")
        if self.every == 0:
            raise ValueError("every: it must be above 0")
        if not re.fullmatch(r"random host|sole holder|every host|host \S+|node|router|controller", self.target):
            raise ValueError(
                f"target: {self.target!r} is none of: random host, sole holder, every host, host NAME, node, router, "
                "controller"
            )
        if self.target in ("router", "controller") and kinds not in ([], [FaultKind.KILL]):
            raise ValueError(f"target: of a {self.target}, the only fault is kill")
        if (FaultKind.KILL_NODE in kinds) and self.target != "node":
            raise ValueError("target: kill_node is for a node")
        return self

    @property
    def is_deadly(self) -> bool:
        """Whether something ends by it."""
        return any(fault.kind in AT_ONCE - {FaultKind.PAUSE} for fault in self.faults)


class LoadSection(Section):
    """The clients that stream completions meanwhile."""

    clients: int = Field(default=8, ge=1)
    tokens: int = Field(default=48, ge=2)
    """Of each answer."""
    prompts: int = Field(default=12, ge=1, le=60)
    """How many different ones; each has one right answer."""
    steady: Seconds = 10.0
    """Before the first fault: what is usual is measured here."""


class MustSection(Section):
    """What has to hold, besides: each answer is the undisturbed one, the mesh is whole at the end."""

    fired: float = Field(default=1.0, gt=0, le=1)
    """Share of the faults that are proven to have happened. In a mix drawn at random, some find nothing to hit: a host
    that is silent, say, of which nothing is asked."""
    success: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are answered."""
    stall_p50: Seconds | None = None
    stall_p99: Seconds | None = None
    """Of the longest gap between two tokens after each fault, above the 99th percentile of what is usual."""
    gap_ratio: float | None = Field(default=None, gt=0)
    """The 99th percentile of all gaps from the first fault on, over that of what is usual."""
    recovery: Seconds | None = None
    """From a death to full coverage, at most."""
    recovery_above_start: Seconds | None = None
    """From the last of several deaths to full coverage, above what the slowest host of this run took to come."""
    throughput: float | None = Field(default=None, gt=0)
    """Tokens per second from `throughput_after` the last fault on, over what is usual."""
    throughput_after: Seconds = 10.0
    settle: Seconds = 60.0
    """How long the mesh has, after the last fault, to be whole again."""


class ShortSection(Section):
    """What is smaller in the short form, for CI."""

    duration: Seconds | None = None
    times: int | None = Field(default=None, ge=1)
    """Of each step, at most."""
    clients: int | None = Field(default=None, ge=1)
    steady: Seconds | None = None


class Script(Section):
    """All of it."""

    name: str = Field(min_length=1)
    about: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    mesh: dict[str, Any] | str | None = None
    """The mesh to start: the keys of a config, or the path of one."""
    url: str | None = None
    """Or one that runs. It has to have been started with `faults: true`."""
    load: LoadSection = LoadSection()
    duration: Seconds | None = None
    """The run ends then; without it, when all steps are done."""
    patience: Seconds = 120.0
    """How long a fault may wait for its condition, or for somebody to hit."""
    steps: tuple[Step, ...] = Field(min_length=1)
    must: MustSection = MustSection()
    short: ShortSection = ShortSection()

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.mesh is None) == (self.url is None):
            raise ValueError("mesh, url: a script has one of them")
        if self.duration is None:
            for number, step in enumerate(self.steps):
                if step.repeats and step.times is None:
                    raise ValueError(f"steps.{number}: without times, or a duration of the script, it would never end")
        return self

    def shortened(self) -> Script:
        """The short form."""
        short = self.short
        steps = [
            step.model_copy(update={"times": min(step.times or short.times, short.times)})
            if short.times and step.repeats
            else step
            for step in self.steps
        ]
        load: dict[str, Any] = {"clients": short.clients, "steady": short.steady}
        load = {key: value for key, value in load.items() if value is not None}
        update: dict[str, Any] = {"steps": tuple(steps), "load": self.load.model_copy(update=load)}
        if short.duration is not None:
            update["duration"] = short.duration
        return self.model_copy(update=update)

    def to_yaml(self) -> str:
        """As a file that says the same."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def parse_script(values: Any, where: str) -> Script:
    """Check what somebody wrote. Raises ConfigError naming the key."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: a script has keys: {', '.join(Script.model_fields)}")
    try:
        return Script.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error)}") from error


def load_script(name: str) -> Script:
    """A script that ships with the package, by its name, or any by its path. Raises ConfigError."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{name}.yaml"
        if not path.exists():
            raise ConfigError(f"script: {name!r} is none of ours ({', '.join(shipped())}), nor the path of a .yaml")
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    return parse_script(values, str(path))


def shipped() -> list[str]:
    """The names of our own scripts."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))
