"""The report of `expertmesh bench decode` as a picture. Knows nothing of how the figures came about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expertmesh.bench.picture import COLORS, new_figure, save

if TYPE_CHECKING:
    from pathlib import Path


def draw_decode(report: dict[str, Any], path: Path) -> None:
    """A group of bars for each number of streams: each side's tokens per second, with its spread."""
    figure = new_figure(9, 4.2)
    axes = figure.subplots()
    rows = report["streams"]
    sides = list(rows[0]["tokens_per_second"])
    width = 0.8 / len(sides)
    for i, side in enumerate(sides):
        of = [row["tokens_per_second"][side] for row in rows]
        medians = [spread["median"] for spread in of]
        errors = [
            [spread["median"] - spread["p10"] for spread in of],
            [spread["p90"] - spread["median"] for spread in of],
        ]
        at = [number + (i - (len(sides) - 1) / 2) * width for number in range(len(rows))]
        color = COLORS[2] if i == 0 else COLORS[(0, 1, 3)[(i - 1) % 3]]
        bars = axes.bar(at, medians, width * 0.95, yerr=errors, ecolor="black", label=side, color=color)
        axes.bar_label(bars, [f"{median:.0f}" for median in medians], fontsize=8)
    axes.set_xticks(range(len(rows)), [str(row["streams"]) for row in rows])
    axes.set_xlabel("streams")
    axes.set_ylabel("tokens per second, all streams together")
    axes.set_title(f"{report['shape']['model']}, bfloat16, {report['environment']['cores']} cores", fontsize=10)
    axes.legend(frameon=False)
    save(figure, path)
