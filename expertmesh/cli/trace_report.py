"""What `expertmesh trace` shows of a simulation or a replay, in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from expertmesh.cli.console import stdout

if TYPE_CHECKING:
    from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 72


def print_replay(result: dict[str, Any]) -> None:
    stdout.print(
        f"{result['exchanges']:,} exchanges of {result['tokens']:,} tokens in {result['wall_s']:.1f} s, at most "
        f"{result['latest_s']:.2f} s behind their time",
        highlight=False,
    )
    if result["exchanges"]:
        milliseconds = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in result["latency_s"].items())
        stdout.print(f"latency of an exchange: {milliseconds}", highlight=False)
    total = sum(result["rows"].values())
    for host, rows in result["rows"].items():
        stdout.print(f"  {host:<12} {rows:>12,} rows  {rows / total:.1%}", highlight=False)
    for kind, count in result["failures"].items():
        stdout.print(f"failed: {count:,} with {kind}, the first: {result['first_failure']}", style="red", markup=False)


def print_simulation(result: dict[str, Any]) -> None:
    of = result["trace"]
    stdout.print(
        f"{result['simulated_s'] / 3600:.3g} h of {of['model']}: {of['layers']} layers, {of['experts']:,} experts, on "
        f"{result['hosts']:,} hosts with {result['slots']:,} slots; {result['evaluated']}",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = ("slowest / ideal", "p50", "p99", "slowest ms", "plans", "replicas loaded", "GB loaded", "per expert")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for name, row in result["strategies"].items():
        table.add_row(
            name,
            f"{row['imbalance_p50']:.3f}",
            f"{row['imbalance_p99']:.3f}",
            f"{row['slowest_s_mean'] * 1e3:.3f}",
            f"{row['plans']:,}",
            f"{row['moves']:,}",
            f"{row['bytes_moved'] / 1e9:,.1f}",
            f"{row['replicas_min']}-{row['replicas_max']}",
        )
    stdout.print(table)
    series = {name: result["series"][name]["imbalance"] for name in result["strategies"]}
    low, high = min(map(min, series.values())), max(map(max, series.values()))
    stdout.print(f"\nslowest / ideal over time, {low:.2f} to {high:.2f}", style="dim", highlight=False)
    for name, values in series.items():
        stdout.print(f"{name:<7} {sparkline(values, low, high)}", highlight=False, no_wrap=True)
    stdout.print(
        f"\nSimulated in {result['wall_s']:.1f} s, of which the planner took {result['plan_s']:.1f} s.", highlight=False
    )


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """`values` as bars of eight heights, means of neighbours where there are more than fit on a line."""
    width = min(_WIDTH, len(values))
    groups = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(group) / len(group) for group in groups]
    return "".join(_BARS[round((mean - low) / (high - low or 1) * (len(_BARS) - 1))] for mean in means)
