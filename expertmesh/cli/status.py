"""`expertmesh status`: what a running mesh is made of."""

from __future__ import annotations

import json
from typing import Annotated, Any

import httpx
import typer
from rich.table import Table

from expertmesh.cli.console import stdout
from expertmesh.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"


def fetch(url: str, path: str) -> Any:
    """What the mesh at `url` answers to a GET of `path`. Raises ConfigError when nothing does."""
    try:
        answer = httpx.get(f"{url.rstrip('/')}{path}", timeout=30)
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"no mesh answers at {url}{path}: {error}; is it running? (--url says where)") from error


def status(
    url: Annotated[str, typer.Option(help="Where the gateway listens.")] = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Show the hosts of a running mesh, what each holds and what it has done.

    Example:

        expertmesh status --url http://127.0.0.1:8000
    """
    model = fetch(url, "/v1/models")["data"][0]
    hosts = fetch(url, "/mesh/hosts")
    placement = fetch(url, "/mesh/placement")
    if as_json:
        stdout.print_json(json.dumps({"model": model, "epoch": placement["epoch"], "hosts": hosts}))
        return
    num_experts = sum(placement["num_experts"])
    stdout.print(
        f"[bold]{model['id']}[/]  {len(placement['num_experts'])} MoE layers, {num_experts} experts, "
        f"context {model['max_model_len']}, placement epoch {placement['epoch']}"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("host", "pool", "state", "replicas", "slots", "rows", "rows/s busy", "process", "address"):
        table.add_column(column, justify="left" if column in ("host", "pool", "state", "address") else "right")
    for host in hosts:
        rate = f"{host['rate']:,.0f}" if host["rate"] else "-"
        cells = (host["id"], host["pool"], host["state"], host["replicas"], host["slots"], host.get("rows"), rate)
        table.add_row(*(str(cell if cell is not None else "-") for cell in (*cells, host["pid"], host["address"])))
    stdout.print(table)
