"""`expertmesh top`: a running mesh on one screen, as it changes."""

from __future__ import annotations

import contextlib
import threading
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from expertmesh.cli.console import stdout
from expertmesh.cli.decisions import describe
from expertmesh.cli.heatmap import draw
from expertmesh.cli.options import Url
from expertmesh.cli.reading import Views, replica_counts, summary
from expertmesh.client import DEFAULT_URL, fetch
from expertmesh.errors import ConfigError

REFRESH_S = 1.0
_STATE_STYLES = {"ready": "green", "draining": "yellow", "starting": "cyan", "unreachable": "red", "gone": "red"}
_ID_LENGTH = 8
"""So much of a router's id, its end, tells it from the others."""
_VIEWS = ("hosts", "routers", "placement", "load", "moves", "decisions")


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show a mesh live: hosts, routers, the load of every expert and its replicas, what is under way, what was decided.

    Example:

        expertmesh top --url http://127.0.0.1:8000
    """
    if once or not stdout.is_terminal:
        stdout.print(frame(look(url), stdout.width))
        return
    pause = threading.Event()
    views = look(url)  # a mesh that was never there is an error; one that goes away may come back
    with contextlib.suppress(KeyboardInterrupt), Live(console=stdout, screen=True, auto_refresh=False) as live:
        while True:
            live.update(frame(views, stdout.width, stdout.height), refresh=True)
            pause.wait(REFRESH_S)
            try:
                views = look(url)
            except ConfigError as error:
                views["moves"] = {"moves": [], "alarm": str(error)}


def look(url: str) -> Views:
    """All views of the mesh at `url`, by name, and what it serves as "model"."""
    model = fetch(url, "/v1/models")["data"][0]["id"]
    return {"model": model} | {view: fetch(url, f"/mesh/{view}") for view in _VIEWS}


def frame(views: Views, width: int, height: int | None = None) -> RenderableType:
    """One picture of a mesh; what there is too much of is cut where `height` lines would not hold it."""
    placed, load, moves = views["placement"], views["load"], views["moves"]
    room = max(8, height - 14 - len(views["hosts"]) - len(views["routers"])) if height else 10**6
    parts: list[RenderableType] = [
        Text.assemble((f"{views['model']}  ", "bold"), summary(placed, load), no_wrap=True),
        Text(),
        host_table(views["hosts"]),
        Text(),
        router_table(views["routers"]),
        Text(),
        _heat(placed, load, width, room // 2),
    ]
    if moves["alarm"]:
        parts.insert(1, Text(moves["alarm"], style="bold red", no_wrap=True))
    parts += [_move_table(moves["moves"], max(3, room // 4)), Text()]
    parts += _newest(views["decisions"], max(3, room // 4) if height else 8)
    return Group(*parts)


def host_table(hosts: list[dict[str, Any]]) -> Table:
    """What each host is, holds and does."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("host", "pool", "state", "replicas", "slots", "busy", "rows/s it can", "rows so far", "process"):
        table.add_column(column, justify="left" if column in ("host", "pool", "state") else "right")
    for host in hosts:
        loading = f" +{host['loading']}" if host["loading"] else ""
        table.add_row(
            host["id"],
            host["pool"],
            Text(host["state"], style=_STATE_STYLES.get(host["state"], "yellow")),
            _number(host["replicas"]) + loading,
            _number(host["slots"]),
            f"{min(1.0, host['busy']):.0%}" if "busy" in host else "-",
            _number(host["rate"]),
            _number(host.get("rows")),
            str(host["pid"]),
        )
    return table


def router_table(routers: list[dict[str, Any]]) -> Table:
    """What each router does, and whom it does not trust."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = ("router", "epoch", "running", "waiting", "hedges", "sent again", "heard of", "avoids")
    for column in columns:
        table.add_column(column, justify="left" if column in ("router", "avoids") else "right")
    for router in routers:
        table.add_row(
            router["id"][-_ID_LENGTH:],
            str(router["epoch"]),
            *(_number(router[name]) for name in ("running", "waiting", "hedges", "sent_again")),
            f"{router['age_s']:.0f} s ago",
            Text(", ".join(router["avoided"]), style="yellow"),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _heat(placed: dict[str, Any], load: dict[str, Any], width: int, most: int) -> Text:
    """The heat map of the layers that are least in balance, as many as there is room for."""
    ratios = [ratio or 0.0 for ratio in load["imbalance_of_layers"]]
    worst = sorted(range(len(ratios)), key=lambda layer: -ratios[layer])[:most]
    numbers = sorted(worst)
    counts = replica_counts(placed)
    title = "load of every expert, and its replicas where it has not just one"
    if len(numbers) < len(ratios):
        title += f"; the {len(numbers)} layers least in balance of {len(ratios)}"
    return draw(
        [load["per_second"][layer] for layer in numbers],
        title=title,
        replicas=[counts[layer] for layer in numbers],
        numbers=numbers,
        width=width,
    )


def _move_table(moves: list[dict[str, Any]], most: int) -> RenderableType:
    """What is under way, and by when it is given up."""
    if not moves:
        return Text("nothing is under way", style="dim")
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=False)
    for move in moves[:most]:
        left = "" if move["left_s"] is None else f"given up in {max(0.0, move['left_s']):.0f} s"
        table.add_row(Text(move["what"]), f"for {move['for_s']:.0f} s", left, Text(move["note"], style="red"))
    if len(moves) > most:
        table.add_row(f"and {len(moves) - most} more", style="dim")
    return table


def _newest(decisions: list[dict[str, Any]], most: int) -> list[RenderableType]:
    """The last decisions, the newest last, a line each."""
    texts = [describe(entry, most=0) for entry in decisions[-most:]]
    for text in texts:
        text.no_wrap, text.overflow = True, "ellipsis"
    return list(texts)
