"""`expertmesh decisions`: what the controller decided, and why."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.text import Text

from expertmesh.cli.console import stdout
from expertmesh.cli.options import Url
from expertmesh.client import DEFAULT_URL, fetch

POLL_S = 1.0
_SHOWN = 8
"""Changes of one plan; the first placement alone has one for every expert."""


def decisions(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, one decision per line.")] = False,
) -> None:
    """Show the decision log, the oldest first: what was done and why, with the figures.

    Examples:

        expertmesh decisions --follow

        expertmesh decisions --json > decisions.jsonl
    """
    seen: list[dict[str, Any]] = []
    pause = threading.Event()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            entries = fetch(url, "/mesh/decisions")
            for entry in newer(seen, entries):
                stdout.out(json.dumps(entry), highlight=False) if as_json else stdout.print(describe(entry))
            seen = entries
            if not follow:
                return
            pause.wait(POLL_S)


def newer(seen: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The entries that came after those seen. All of them if they share none: the controller is another one."""
    if not seen:
        return entries
    last = seen[-1]["time"], seen[-1]["what"]
    for position in range(len(entries) - 1, -1, -1):
        if (entries[position]["time"], entries[position]["what"]) == last:
            return entries[position + 1 :]
    return entries


def describe(entry: dict[str, Any], most: int = _SHOWN) -> Text:
    """One decision: a line, and one for each of at most so many changes of the placement."""
    at = datetime.datetime.fromtimestamp(entry["time"]).strftime("%H:%M:%S")
    again = f" ({entry['times']} times)" if "times" in entry else ""
    text = Text().append(f"{at}  ", "dim").append(f"{entry['what']:<12}", "bold").append(f" {entry['why']}{again}")
    changes = entry.get("changes", ())
    for change in changes[:most]:
        sign = "+" if change["what"] == "add" else "-"
        layer, index = change["expert"]
        text.append(f"\n{'':10}{sign} {layer}:{index} on {change['host']}  {change['why']}", "dim")
    if most and len(changes) > most:
        text.append(f"\n{'':10}and {len(changes) - most} more changes", "dim")
    return text
