"""The report of `expertmesh bench gate` as a picture. Knows nothing of how the figures came about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expertmesh.bench.picture import COLORS, new_figure, save

if TYPE_CHECKING:
    from pathlib import Path

_MOST_ROWS, _MOST_LOSS = 2.2, 0.03
"""What is shown: past it only gates that nobody would serve with."""
_FAMILIES = {"top-p": COLORS[2], "threshold": COLORS[3], "softmax-topk": COLORS[1]}


def draw_gates(report: dict[str, Any], path: Path) -> None:
    """Each gate by its expert rows for each token and its loss over the checkpoint's gate; what we wish is shaded."""
    figure = new_figure(9, 4.8)
    axes = figure.subplots()
    own = report["gates"]["its own"]["rows_per_token"]
    wish = report["wish"]
    axes.fill_between(
        [0, own * (1 - wish["fewer_rows"])],
        -0.001,
        wish["higher_loss"],
        color="#e8f1e4",
        label=f"{wish['fewer_rows']:.0%} fewer rows, at most {wish['higher_loss']:.0%} more loss",
    )
    left_out = []
    for family, color in {**_FAMILIES, "": COLORS[0]}.items():
        of_family = {
            name: of
            for name, of in report["gates"].items()
            if (name.startswith(family) if family else not name.startswith(tuple(_FAMILIES)))
        }
        shown = {name: of for name, of in of_family.items() if _is_shown(of)}
        left_out += [name for name in of_family if name not in shown]
        points = sorted((of["rows_per_token"], of["higher_loss"]) for of in shown.values())
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            linestyle="",
            marker="o",
            markersize=5,
            color=color,
            label=family or "others",
        )
        for name, of in shown.items():
            at = (of["rows_per_token"], of["higher_loss"])
            label = name.removeprefix(f"{family} ").removesuffix(" of 2")
            axes.annotate(label, at, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlim(0.9, _MOST_ROWS)
    axes.set_ylim(-0.001, _MOST_LOSS)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.1%}")
    axes.set_xlabel(f"expert rows for each token (the checkpoint's gate takes {own:g})")
    axes.set_ylabel("loss over the checkpoint's gate")
    axes.set_title(f"The tiny model, {report['text']['tokens']:,} held-out tokens", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    figure.supxlabel("out of the picture: " + "; ".join(left_out), fontsize=6)
    save(figure, path)


def _is_shown(of: dict[str, Any]) -> bool:
    return bool(of["rows_per_token"] <= _MOST_ROWS and of["higher_loss"] <= _MOST_LOSS)
