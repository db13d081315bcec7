"""The hosts of a simulation: values, made from a few figures or read from an inventory file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from expertmesh.errors import ConfigError
from expertmesh.ids import HostId
from expertmesh.placement import TimeModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from expertmesh.trace.format import TraceHeader

SPARE = 1.25
"""Slots over experts, unless said otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHost:
    """One host of the fleet."""

    host: HostId
    slots: int
    time_model: TimeModel
    node: str = ""
    rack: str = ""


def model_fleet(header: TraceHeader, hosts: int, slots: int | None, model: TimeModel, slow: float) -> list[ModelHost]:
    """So many hosts of so many slots (by default room for a quarter more than the experts), a part `slow` of which
    takes twice as long as `model` says. Raises ConfigError.
    """
    if hosts < 1:
        raise ConfigError(f"hosts: {hosts} is not above 0")
    if slots is not None and slots < 1:
        raise ConfigError(f"slots: {slots} is not above 0")
    if not (0 <= model.launch_s < math.inf and 0 <= model.expert_s < math.inf and 0 < model.row_s < math.inf):
        raise ConfigError("launch_ms, expert_us, row_us: a launch and an expert must cost 0 or more, a row more than 0")
    if not 0 <= slow <= 1:
        raise ConfigError(f"slow: {slow} is not between 0 and 1")
    each = slots or math.ceil(SPARE * sum(header.num_experts) / hosts)
    width = len(str(hosts - 1))
    models = (model, TimeModel(2 * model.launch_s, 2 * model.row_s, 2 * model.expert_s))
    num_slow = round(slow * hosts)
    return [
        ModelHost(host=HostId(f"h{i:0{width}}"), slots=each, time_model=models[i >= hosts - num_slow])
        for i in range(hosts)
    ]


def ideal_s(models: Sequence[TimeModel], num_rows: int, num_experts: int) -> float:
    """A time in which hosts that all held every expert could just do these rows of these experts, split at will.

    Like water filled over uneven ground: with the time, hosts come in whose launch is the shorter. Each expert is read
    once, at the least of what that costs in rows; so for hosts of which none is better at the one and worse at the
    other this is the least time, and for others no split is faster.
    """
    launch_s, row_s = np.array(sorted((model.launch_s, model.row_s) for model in models)).T
    work = num_rows + num_experts * min(model.expert_s / model.row_s for model in models)
    return float(((work + np.cumsum(launch_s / row_s)) / np.cumsum(1 / row_s)).min())


def inventory_hosts(path: Path) -> list[ModelHost]:
    """The hosts of an inventory file as `expertmesh plan` takes it; "launch_s" and "expert_s" may stand beside "rate".

    Raises ConfigError.
    """
    try:
        listed = json.loads(path.read_text())["hosts"]
        hosts = [_host(entry) for entry in listed]
    except OSError as error:
        raise ConfigError(f"inventory: {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"inventory: {path}: no valid {error}") from error
    if not hosts:
        raise ConfigError(f"inventory: {path}: it lists no hosts")
    return hosts


def _host(entry: Mapping[str, Any]) -> ModelHost:
    name, slots, rate = entry["host"], entry["slots"], entry.get("rate", 1.0)
    launch_s, expert_s = entry.get("launch_s", 0.0), entry.get("expert_s", 0.0)
    if not isinstance(name, str) or type(slots) is not int or slots < 0:
        raise ValueError(f"host or slots in {dict(entry)}")
    if not (0 < rate < math.inf and 0 <= launch_s < math.inf and 0 <= expert_s < math.inf):
        raise ValueError(f"rate, launch_s or expert_s in {dict(entry)}")
    return ModelHost(
        host=HostId(name),
        slots=slots,
        time_model=TimeModel(launch_s, 1 / rate, expert_s),
        node=str(entry.get("node", "")),
        rack=str(entry.get("rack", "")),
    )
