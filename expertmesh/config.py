"""What users write: one YAML file per deployment, which Ray Serve reads too.

Sections are frozen and refuse unknown keys; a default lives here and nowhere else. Each component receives only its
own section.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from expertmesh.errors import ConfigError


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        """Refuse unknown keys with the nearest known one, before pydantic refuses them without."""
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(cls.model_fields)}"
                    raise ValueError(f"unknown key {key!r}; {hint}")
        return values


class PoolSection(Section):
    """A class of hosts."""

    name: str = Field(default="cpu", min_length=1)
    device: Literal["cpu", "cuda"] = "cpu"
    hosts: int = Field(default=2, ge=0, le=10_000)
    """Host processes to begin with."""
    min: int | None = Field(default=None, ge=0, le=10_000)
    """Never fewer hosts than this; by default `hosts`. 0: a pool that may be given up, where others can hold all."""
    max: int | None = Field(default=None, ge=1, le=10_000)
    """Never more hosts than this; by default `hosts`."""
    standby: int = Field(default=0, ge=0, le=1_000)
    """Hosts beyond those that are kept started and empty: with one, growing takes a moment instead of a start."""
    target: float = Field(default=0.7, gt=0, le=1)
    """The share of their time that hosts should be busy: above it for long, a host is added; well below, one goes."""
    cost: float = Field(default=0, ge=0)
    """Price of keeping a replica here, in any unit: cold experts go to the cheapest pool that is fast enough."""
    cpus: float = Field(default=0.5, gt=0)
    """Ray CPUs per host; it computes with this many threads, at least one."""
    gpus: float = Field(default=0, ge=0)
    """Ray GPUs per host."""
    memory: ByteSize | None = None
    """For experts, per host, such as 24GiB; by default this pool's share of what is free on the device."""
    accelerator: str | None = None
    """A Ray accelerator type, such as H100."""
    labels: dict[str, str] = {}
    """A Ray label selector that nodes must match."""

    @property
    def fewest_hosts(self) -> int:
        return self.hosts if self.min is None else self.min

    @property
    def most_hosts(self) -> int:
        return self.hosts if self.max is None else self.max

    @model_validator(mode="after")
    def _sizes_agree(self) -> PoolSection:
        if not self.fewest_hosts <= self.hosts <= self.most_hosts or self.most_hosts == 0:
            raise ValueError(
                f"hosts: {self.hosts} must lie between min, {self.fewest_hosts}, and max, {self.most_hosts}, above 0"
            )
        return self

    @model_validator(mode="after")
    def _device_fits(self) -> PoolSection:
        if self.device == "cuda" and not self.gpus:
            raise ValueError("gpus: a pool with device cuda needs more than 0 for each host")
        return self


class ExpertsSection(Section):
    """How experts are placed."""

    min_replicas: int = Field(default=1, ge=1)
    """Ready copies of every expert, each on another host, and on another node where there is one."""
    elastic: bool = True
    """Whether hot experts gain replicas and cold ones lose them. False keeps the first placement while hosts live."""
    half_life_s: float = Field(default=5, gt=0)
    """Load that is this old counts half."""
    replan_s: float = Field(default=2, gt=0)
    """How often the placement is weighed against the load."""


class RouterSection(Section):
    """The dense model and its engine."""

    replicas: int = Field(default=1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    cpus: float = Field(default=0.5, gt=0)
    gpus: float = Field(default=0, ge=0)
    engine: Literal["auto", "continuous", "simple"] = "auto"
    max_context: int | None = Field(default=None, ge=2)
    """Prompt plus generated tokens of one request; by default what the model was trained for, up to 8,192."""
    max_requests: int = Field(default=64, ge=1)
    """Decoded together."""
    max_queue: int = Field(default=256, ge=1)
    """Waiting for a place among them; beyond it, requests are answered with 429."""
    max_batch_tokens: int = Field(default=512, ge=16)
    """In one forward pass, prompts included."""
    kv_tokens: int = Field(default=65_536, ge=256)
    """Tokens that the key-value cache holds over all requests."""

    @model_validator(mode="after")
    def _limits_agree(self) -> RouterSection:
        if self.max_batch_tokens < self.max_requests:
            raise ValueError(
                f"max_batch_tokens: {self.max_batch_tokens} is less than max_requests, {self.max_requests}"
            )
        if self.kv_tokens < (self.max_context or 0):
            raise ValueError(f"kv_tokens: {self.kv_tokens} is less than max_context, {self.max_context}")
        return self


class GatewaySection(Section):
    """The HTTP ingress."""

    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=0.1, ge=0)
    max_body: ByteSize = ByteSize(4 * 2**20)
    """Of one request; larger ones are answered with 413."""
    max_ongoing_requests: int = Field(default=512, ge=1)


class ExchangeSection(Section):
    """How long experts may take."""

    timeout_s: float = Field(default=60, gt=0)
    """For one layer, waiting for a replica included."""
    attempt_timeout_s: float = Field(default=20, gt=0)
    """For one host's answer; then the rows go to another replica."""


class NetworkSection(Section):
    """Who can reach hosts."""

    listen: Literal["loopback", "node"] = "loopback"
    """`loopback`: processes of the same machine. `node`: other machines, at the node's address in the cluster."""


class MeshConfig(Section):
    """One deployment: a model and where its parts run."""

    model: Annotated[str, Field(min_length=1)] = "tiny"
    """A checkpoint folder, a hub id, or `tiny`, the model that ships with the package."""
    served_name: str | None = None
    """What clients call it; by default the model's own name."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the dense model and the experts; by default the checkpoint's."""
    pools: tuple[PoolSection, ...] = (PoolSection(),)
    experts: ExpertsSection = ExpertsSection()
    router: RouterSection = RouterSection()
    gateway: GatewaySection = GatewaySection()
    exchange: ExchangeSection = ExchangeSection()
    network: NetworkSection = NetworkSection()

    @model_validator(mode="after")
    def _pools_fit(self) -> MeshConfig:
        names = [pool.name for pool in self.pools]
        if not names or len(set(names)) != len(names):
            raise ValueError("pools: at least one is needed, each with another name")
        num_hosts = sum(pool.hosts for pool in self.pools)
        if self.experts.min_replicas > num_hosts:
            copies = self.experts.min_replicas
            raise ValueError(f"experts.min_replicas: {copies} copies need as many hosts; the pools have {num_hosts}")
        return self

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.served_name or (Path(self.model).name if Path(self.model).is_dir() else self.model)


def parse_config(values: dict[str, Any], where: str = "config") -> MeshConfig:
    """Check what a user wrote. Raises ConfigError naming the key."""
    try:
        return MeshConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic error in one line: where, what."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
