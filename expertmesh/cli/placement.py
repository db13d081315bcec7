"""`expertmesh placement`: which host holds which expert, and how busy it is."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from expertmesh.cli.console import stdout
from expertmesh.cli.heatmap import draw
from expertmesh.cli.options import AsJson, Url
from expertmesh.cli.reading import holders, replica_counts, summary
from expertmesh.client import DEFAULT_URL, fetch
from expertmesh.errors import ConfigError


def placement(
    layer: Annotated[int | None, typer.Option(help="Show this MoE layer, a line for each expert.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show the replicas of every expert with its load: of all layers a map, of one layer a table of experts and hosts.

    Examples:

        expertmesh placement

        expertmesh placement --layer 2
    """
    placed, load = fetch(url, "/mesh/placement"), fetch(url, "/mesh/load")
    where = holders(placed)
    if layer is not None and not 0 <= layer < len(where):
        raise ConfigError(f"layer: {layer} is none of 0 to {len(where) - 1}")
    if as_json:
        shown = range(len(where)) if layer is None else (layer,)
        layers = [_layer_values(number, where[number], load) for number in shown]
        stdout.print_json(json.dumps({"epoch": placed["epoch"], "imbalance": load["imbalance"], "layers": layers}))
        return
    stdout.print(summary(placed, load), highlight=False)
    if layer is None:
        title = "\nload of every expert, and its replicas where it has not just one"
        stdout.print(draw(load["per_second"], title=title, replicas=replica_counts(placed), width=stdout.width))
    else:
        names = [host["id"] for host in placed["hosts"]]
        stdout.print(_layer_table(where[layer], load["per_second"][layer], names))


def _layer_values(number: int, where: list[list[str]], load: dict[str, Any]) -> dict[str, Any]:
    experts = [
        {"expert": expert, "load": rows, "hosts": hosts}
        for expert, (rows, hosts) in enumerate(zip(load["per_second"][number], where, strict=True))
    ]
    return {"layer": number, "imbalance": load["imbalance_of_layers"][number], "experts": experts}


def _layer_table(where: list[list[str]], loads: list[float], names: list[str]) -> Table:
    """Experts and hosts as a matrix, or, with too many hosts for one, with a list."""
    total = sum(loads) or 1.0
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("expert", "rows/s", "share", "replicas"):
        table.add_column(column, justify="right")
    is_matrix = sum(len(name) + 2 for name in names) + 34 <= stdout.width
    for name in names if is_matrix else ["hosts"]:
        table.add_column(name, justify="center" if is_matrix else "left")
    for expert, (rows, hosts) in enumerate(zip(loads, where, strict=True)):
        held = [Text("●" if name in hosts else "·") for name in names] if is_matrix else [Text(", ".join(hosts))]
        table.add_row(str(expert), f"{rows:,.1f}", f"{rows / total:.1%}", str(len(hosts)), *held)
    return table
