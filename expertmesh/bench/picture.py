"""Bench reports as pictures, for those who would rather see than read. Needs the `bench` extra, for matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

COLORS = ("#b8b8b8", "#e0a458", "#2a7f9e", "#7c5295")


def draw_balance(report: dict[str, Any], path: Path) -> None:
    """Of `bench balance`: the slowest host's time over the ideal, a group of bars for each case, and the bounds."""
    figure = new_figure(9, 4.2)
    axes = figure.subplots()
    cases = report["cases"]
    sides = [name for name in cases[0]["mean"] if not name.startswith("bound")]
    width = 0.8 / len(sides)
    for i, side in enumerate(sides):
        values = [case["mean"][side] for case in cases]
        at = [number + (i - (len(sides) - 1) / 2) * width for number in range(len(cases))]
        bars = axes.bar(at, values, width * 0.95, label=side, color=COLORS[i % len(COLORS)])
        axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=8)
    for number, case in enumerate(cases):
        axes.hlines(case["mean"]["bound of any split"], number - 0.4, number + 0.4, color="black", linewidth=1)
    axes.set_xticks(range(len(cases)), [case["case"].replace(", ", "\n") for case in cases], fontsize=8)
    axes.set_ylabel("slowest host's time over the ideal")
    axes.set_title(
        "The load has drifted since the plan; the black line no split of our placement can beat", fontsize=10
    )
    axes.legend(frameon=False)
    save(figure, path)


def draw_shift(report: dict[str, Any], path: Path) -> None:
    """Of `bench elastic`: the imbalance of the hosts over time, from the shift of topic on."""
    figure = new_figure(8, 3.2)
    axes = figure.subplots()
    timeline = report["shift"]["timeline"]
    at_s = [entry["at_s"] for entry in timeline]
    axes.plot(at_s, [entry["imbalance"] for entry in timeline], color=COLORS[2], marker="o", markersize=3)
    axes.axhline(1.15, color=COLORS[1], linestyle="--", linewidth=1, label="1.15")
    axes.set_ylim(bottom=1.0)
    axes.set_xlabel("seconds since the topic of all requests changed")
    axes.set_ylabel("slowest host over mean")
    axes.legend(frameon=False)
    save(figure, path)


def draw_simulation(report: dict[str, Any], path: Path) -> None:
    """Of `trace simulate`: the slowest host's time over the ideal for each strategy, and what ours moved, over time."""
    figure = new_figure(9, 4.2)
    over, under = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    series = report["series"]
    at_min = [start_s / 60 for start_s in series["start_s"]]
    for i, strategy in enumerate(report["strategies"]):
        over.plot(at_min, series[strategy]["imbalance"], color=COLORS[i % len(COLORS)], linewidth=1, label=strategy)
    over.set_ylim(bottom=1.0)
    over.set_ylabel("slowest host's\ntime over the ideal")
    over.legend(frameon=False, ncols=3)
    under.bar(at_min, series["ours"]["moves"], width=report["window_s"] / 60, color=COLORS[2])
    under.set_ylabel("replicas\nmoved by ours")
    under.set_xlabel("minutes of the trace")
    save(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty one, in inches. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("picture: drawing needs matplotlib; pip install 'expertmesh[bench]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write it. Raises ConfigError when that cannot be."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"picture: {path}: {error}") from error
