"""`expertmesh plan`: the production planner on files, with nothing running."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, RootModel, ValidationError
from rich.table import Table

from expertmesh.cli.console import stdout
from expertmesh.cli.heatmap import draw
from expertmesh.config import Section, describe
from expertmesh.control.planner import HostSupply, Plan, PlanOptions
from expertmesh.control.planner import plan as make_plan
from expertmesh.errors import ConfigError
from expertmesh.ids import ExpertId, HostId

_DEFAULTS = PlanOptions()
_REASONS_SHOWN = 12


class LoadsFile(Section):
    layers: list[list[float]]


class HostEntry(Section):
    """As `HostSupply`, whose defaults apply."""

    host: str
    slots: int
    rate: float | None = None
    node: str | None = None
    rack: str | None = None
    cost: float | None = None

    def supply(self) -> HostSupply:
        return HostSupply(**self.model_dump(exclude_none=True))


class InventoryFile(Section):
    hosts: list[HostEntry]


class PlacementFile(RootModel[dict[str, list[tuple[int, int]]]]):
    """Per host, its [layer, expert] pairs."""


class PlanFile(BaseModel):
    """What this command puts out; only the placement is of interest."""

    placement: PlacementFile


def plan(
    loads: Annotated[Path, typer.Option(help=r'{"layers": \[\[rows per second of expert 0, 1, ...], ...]}')],
    inventory: Annotated[
        Path,
        typer.Option(help=r'{"hosts": \[{"host": "a", "slots": 24, "rate": 1.0, "node": "n1", "rack": "r1"}, ...]}'),
    ],
    current: Annotated[Path | None, typer.Option(help='What an earlier plan put out, or its "placement".')] = None,
    min_replicas: Annotated[int, typer.Option(help="Replicas that every expert must have.")] = _DEFAULTS.min_replicas,
    landing_slots: Annotated[
        int, typer.Option(help="Slots to leave empty on each host, if everything fits.")
    ] = _DEFAULTS.landing_slots,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Decide which hosts hold each expert, and how its load is split over them, from files alone.

    Example:

        expertmesh plan --loads loads.json --inventory hosts.json --current before.json --json
    """
    layers = _read(loads, LoadsFile).layers
    hosts = [entry.supply() for entry in _read(inventory, InventoryFile).hosts]
    options = PlanOptions(min_replicas=min_replicas, landing_slots=landing_slots)
    planned = make_plan(layers, hosts, _read_placement(current) if current else None, options)
    if as_json:
        typer.echo(json.dumps(_to_json(planned, hosts)))
    else:
        _show(planned, hosts, layers)
        if current:
            _show_reasons(planned)


_Model = TypeVar("_Model", bound=BaseModel)


def _read(path: Path, model: type[_Model]) -> _Model:
    try:
        return model.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from error


def _read_placement(path: Path) -> dict[ExpertId, tuple[HostId, ...]]:
    """From a file with a placement alone, or with all that a plan puts out."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    is_whole = isinstance(value, dict) and "placement" in value
    held = _read(path, PlanFile).placement if is_whole else _read(path, PlacementFile)
    replicas: dict[ExpertId, tuple[HostId, ...]] = {}
    for host, experts in held.root.items():
        for layer, index in experts:
            expert = ExpertId(layer, index)
            replicas[expert] = (*replicas.get(expert, ()), HostId(host))
    return replicas


def _held(planned: Plan, hosts: list[HostSupply]) -> dict[HostId, list[ExpertId]]:
    held: dict[HostId, list[ExpertId]] = {supply.host: [] for supply in hosts}
    for expert, holders in planned.replicas.items():
        for host in holders:
            held[host].append(expert)
    return held


def _to_json(planned: Plan, hosts: list[HostSupply]) -> dict[str, Any]:
    return {
        "placement": {host: [list(expert) for expert in experts] for host, experts in _held(planned, hosts).items()},
        "split": {str(expert): dict(shares) for expert, shares in planned.split.items()},
        # JSON has no infinity: null is a layer that no host with a rate can serve.
        "max_time": [time if isfinite(time) else None for time in planned.max_time],
        "ideal": list(planned.ideal),
        "moves": planned.moves,
        "survives": planned.survives,
        "reasons": [
            {"expert": str(change.expert), "host": change.host, "what": change.what, "why": change.why}
            for change in planned.reasons
        ],
    }


def _show(planned: Plan, hosts: list[HostSupply], layers: list[list[float]]) -> None:
    ratios = [slow / ideal for slow, ideal in zip(planned.max_time, planned.ideal, strict=True) if ideal]
    mean = f", the slowest host takes {sum(ratios) / len(ratios):.3f} times the ideal" if ratios else ""
    lost = {"nothing": "no failure of a host"}.get(planned.survives, f"any one {planned.survives} failing")
    stdout.print(f"{planned.moves} replicas to load{mean}; survives {lost}", highlight=False)

    busy: dict[HostId, float] = {supply.host: 0.0 for supply in hosts}
    for expert, shares in planned.split.items():
        for host, share in shares.items():
            busy[host] += share * layers[expert.layer][expert.index]
    held = _held(planned, hosts)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("host", "node", "rack", "rate", "replicas", "slots", "load", "load / rate"):
        table.add_column(column, justify="left" if column in ("host", "node", "rack") else "right")
    for supply in sorted(hosts, key=lambda supply: supply.host):
        load = busy[supply.host]
        time = f"{load / supply.rate:,.4g}" if supply.rate else "-"
        counts = str(len(held[supply.host])), str(supply.slots)
        table.add_row(supply.host, supply.node, supply.rack, f"{supply.rate:g}", *counts, f"{load:,.4g}", time)
    stdout.print(table)

    replicas = [
        [len(planned.replicas[ExpertId(layer, index)]) for index in range(len(loads))]
        for layer, loads in enumerate(layers)
    ]
    title = "\nload of every expert, and its replicas where it has not just one"
    stdout.print(draw(layers, title=title, replicas=replicas, width=stdout.width))


def _show_reasons(planned: Plan) -> None:
    for change in planned.reasons[:_REASONS_SHOWN]:
        sign = "+" if change.what == "add" else "-"
        stdout.print(f"{sign} {change.expert} on {change.host}: {change.why}", highlight=False, markup=False)
    if (more := len(planned.reasons) - _REASONS_SHOWN) > 0:
        stdout.print(f"and {more} changes more; --json has all", style="dim", highlight=False)
