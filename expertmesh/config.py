"""What users write: one YAML file per deployment, which Ray Serve reads too.

Sections are frozen and refuse unknown keys; a default lives here and nowhere else. Each component receives only its
own section.
"""

from __future__ import annotations

import difflib
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from expertmesh.errors import ConfigError, one_line
from expertmesh.gates.spec import GateSpec
from expertmesh.gates.strategies import STRATEGIES
from expertmesh.tls import TlsFiles

_GREATEST = 2**53
"""Of all numbers; what is computed with them stays exact, and never overflows."""


class Section(BaseModel):
    """Base of all sections. Numbers are finite: nothing can wait for an infinite time, or share it out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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

    @model_validator(mode="after")
    def _refuse_absurd_numbers(self) -> Self:
        for name in type(self).model_fields:
            if isinstance(value := getattr(self, name), int | float) and abs(value) > _GREATEST:
                raise ValueError(f"{name}: it must be at most {_GREATEST:,}")
        return self


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
    """How experts are held and placed."""

    weight_format: Literal["dense", "int8", "int4_g32", "int4_g64", "int4_g128", "fp8", "fp8_block"] = "dense"
    """How hosts store weights, which they quantize as they read them (kernels/formats.py): of 8 bits, twice as many fit
    as of 16. `g32` to `g128` is how many columns share a scale. CPU hosts save memory with `int8` and `fp8` only."""
    portable: bool = False
    """Whether CPU hosts of unlike makes must give the same bits. By default each computes as is fastest on it: where
    processors have products for bfloat16, that may be twice as fast, and only like ones agree to the last bit."""
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
    resume_s: float = Field(default=60, gt=0)
    """How long a request waits for a router when there is none; then it is answered with 503."""
    drain_s: float = Field(default=30, gt=0)
    """How long a router that is replaced may work on; then another goes on with what it has not finished."""
    surge: bool = True
    """When a changed config is deployed, start the new routers before the old ones stop; false if both do not fit."""

    @model_validator(mode="after")
    def _limits_agree(self) -> RouterSection:
        if self.max_batch_tokens < self.max_requests:
            raise ValueError(
                f"max_batch_tokens: {self.max_batch_tokens} is less than max_requests, {self.max_requests}"
            )
        if self.kv_tokens < (self.max_context or 0):
            raise ValueError(f"kv_tokens: {self.kv_tokens} is less than max_context, {self.max_context}")
        return self


class ApiKey(Section):
    """One client's key, as `expertmesh key` draws it; only its hash is kept."""

    name: str = Field(min_length=1)
    """Whose it is."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class GatewaySection(Section):
    """The HTTP ingress."""

    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=0.1, ge=0)
    max_body: ByteSize = ByteSize(4 * 2**20)
    """Of one request; larger ones are answered with 413."""
    api_keys: tuple[ApiKey, ...] = ()
    """Who may use the model; by default everyone who reaches the gateway."""
    max_ongoing_requests: int | None = Field(default=None, ge=1)
    """HTTP requests at once, of one gateway; by default all that routers have room for, and some to look at the mesh.
    As many may wait before it; more are answered with 429."""
    drain_s: float = Field(default=300, gt=0)
    """How long a gateway that is replaced may go on streaming to its clients."""


class ExchangeSection(Section):
    """How long experts may take."""

    timeout_s: float = Field(default=60, gt=0)
    """For one layer, waiting for a replica included."""
    attempt_timeout_s: float = Field(default=20, gt=0)
    """For one host's answer; then the rows go to another replica."""
    hedge_share: float = Field(default=0.05, ge=0, le=1)
    """Of all requests to hosts, how many may be sent in vain to a second one as well because the first is late."""
    double_check_share: float = Field(default=0, ge=0, le=1)
    """Of all requests to hosts, how many are computed by a second one as well, to compare: finds devices that compute
    wrongly without saying so."""


class GateSection(Section):
    """A gate in the place of the checkpoint's, in every layer; `gates/strategies.py` says what there is.

    What each field means, and what it is by default, `GateSpec` says. What depends on the model is checked when it is
    loaded.
    """

    strategy: str
    k: int | None = None
    normalize: bool | None = None
    scale: float | None = None
    num_groups: int | None = None
    groups_kept: int | None = None
    group_score: str | None = None
    top_p: float | None = None
    ratio: float | None = None
    capacity_factor: float | None = None
    overflow: str | None = None
    by_confidence: bool | None = None
    depends_on_batch: bool = False
    """Whether it may be a gate by which an answer depends on what else is computed at the time."""

    @property
    def spec(self) -> GateSpec:
        """For a layer of any size. Raises ConfigError, as making the section does."""
        return GateSpec(**self.model_dump(exclude_none=True, exclude={"depends_on_batch"}))

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        try:
            spec = self.spec
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if missing := STRATEGIES[spec.strategy].inputs:
            raise ValueError(
                f"gate.strategy {spec.strategy} needs {' and '.join(missing)}, which served models do not have: use"
                " another strategy"
            )
        if not (spec.is_alone or self.depends_on_batch):
            raise ValueError(
                f"{spec.why_not_alone}, so that answers would differ from batch to batch: set gate.depends_on_batch to"
                " true if that is wanted, or choose another gate"
            )
        return self


class TlsSection(Section):
    """Files in PEM, at these paths on every node; `expertmesh certs` makes them."""

    ca: str = Field(min_length=1)
    """The authority whose certificates are trusted."""
    certificate: str = Field(min_length=1)
    """This node's, in the name host.expertmesh."""
    key: str = Field(min_length=1)
    """The certificate's, which only its owner may read."""


class NetworkSection(Section):
    """Who can reach hosts."""

    listen: Literal["loopback", "node"] = "loopback"
    """`loopback`: processes of the same machine. `node`: other machines, at the node's address in the cluster."""
    tls: TlsSection | None = None
    """Encrypts what goes between machines, and lets only those take part who have a certificate."""

    @property
    def tls_files(self) -> TlsFiles | None:
        return None if self.tls is None else TlsFiles(**self.tls.model_dump())


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
    gate: GateSection | None = None
    """By default the checkpoint's own."""
    network: NetworkSection = NetworkSection()
    faults: bool = False
    """Whether who has the token may break hosts, routers and the controller, to test what happens then."""

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
    def places(self) -> int:
        """Sequences that one gateway takes on: its share of what all routers have room for."""
        router = self.router
        return math.ceil(router.replicas * (router.max_requests + router.max_queue) / self.gateway.replicas)

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.served_name or (Path(self.model).name if os.path.isdir(self.model) else self.model)


def parse_config(values: dict[str, Any], where: str = "config") -> MeshConfig:
    """Check what a user wrote. Raises ConfigError naming the key."""
    try:
        return MeshConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic error in one line: where, what."""
    first = error.errors()[0]
    place = ".".join(one_line(str(part)) for part in first["loc"])
    message = one_line(first["msg"].removeprefix("Value error, "))
    return f"{place}: {message}" if place else message
