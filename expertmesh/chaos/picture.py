"""A run as a picture: throughput over time, with the faults marked. Needs the `bench` extra, for matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expertmesh.bench.picture import COLORS, new_figure, save

if TYPE_CHECKING:
    from pathlib import Path


def draw_run(report: dict[str, Any], path: Path) -> None:
    """Of `chaos run`: tokens per second, and a line for each fault."""
    figure = new_figure(10, 3.4)
    axes = figure.subplots()
    tokens = report["tokens_per_second"]
    at_s = [tokens["from_s"] + tokens["every_s"] * number for number in range(len(tokens["timeline"]))]
    axes.step(at_s, tokens["timeline"], where="post", color=COLORS[2], linewidth=1)
    axes.axhline(tokens["usual"], color=COLORS[0], linestyle="--", linewidth=1)
    kinds = list(report["faults"])
    shown = set()
    for strike in report["strikes"]:
        kind = "+".join(strike["kinds"])
        label = None if kind in shown else kind
        shown.add(kind)
        color = f"C{kinds.index(kind)}"
        axes.axvline(strike["at_s"], color=color, linewidth=0.8, alpha=0.6, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the first fault could come")
    axes.set_ylabel("tokens per second")
    failed, stall = report["failed"], report["stall_s"]["max"]
    worst = "" if stall is None else f"; longest stall {stall:.2f} s"
    title = f"{report['chaos']}: {report['requests']} requests, {failed} failed{worst}; dashed: undisturbed"
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, path)
