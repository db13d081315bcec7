"""`expertmesh status`: what a running mesh is made of."""

from __future__ import annotations

import json

from expertmesh.cli.console import stdout
from expertmesh.cli.options import AsJson, Url
from expertmesh.cli.reading import summary
from expertmesh.cli.top import host_table, router_table
from expertmesh.client import DEFAULT_URL, fetch


def status(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show the hosts and routers of a running mesh, what each does, how balanced the load is, and what is under way.

    Example:

        expertmesh status --url http://127.0.0.1:8000
    """
    model = fetch(url, "/v1/models")["data"][0]
    hosts, routers, placed, load, moves = (
        fetch(url, f"/mesh/{view}") for view in ("hosts", "routers", "placement", "load", "moves")
    )
    if as_json:
        values = {"model": model, "epoch": placed["epoch"], "imbalance": load["imbalance"]}
        stdout.print_json(json.dumps(values | {"hosts": hosts, "routers": routers, **moves}))
        return
    layers = len(placed["num_experts"])
    stdout.print(f"[bold]{model['id']}[/]  {layers} MoE layers, context {model['max_model_len']}", highlight=False)
    stdout.print(summary(placed, load), highlight=False)
    stdout.print(host_table(hosts))
    stdout.print(router_table(routers))
    if moves["moves"]:
        stdout.print(f"{len(moves['moves'])} steps are under way; `expertmesh top` shows them", highlight=False)
    if moves["alarm"]:
        stdout.print(moves["alarm"], style="bold red", highlight=False)
