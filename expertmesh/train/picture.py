"""Draws what `compare` found: loss, balancedness and dead experts over the tokens of training.

Needs the `bench` extra, for matplotlib. Knows the report and nothing of how it came to be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expertmesh.bench.picture import COLORS, new_figure, save
from expertmesh.errors import ConfigError
from expertmesh.train.trial import AS_SERVED

if TYPE_CHECKING:
    from pathlib import Path

SIDE_COLORS = {
    "none": "#b23a48",
    "aux": COLORS[2],
    "aux+z": COLORS[3],
    "bias": COLORS[1],
    "expert-choice": "#5b8c5a",
}
WARM_UP_SHARE = 0.1
"""Of each curve: losses before are so high that they would press the rest flat."""


def refuse_undrawable(path: Path) -> None:
    """Raise ConfigError now for a picture that could not be written in the end."""
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise ConfigError(f"picture: {path}: the ending says no kind of picture; use .svg, .png or .pdf")


def draw(report: dict[str, Any], path: Path) -> None:
    """Three panels, a line for each side; of layers, the least balanced one and the sum of the dead."""
    figure = new_figure(11, 4)
    over_loss, over_balance, over_dead = figure.subplots(1, 3)
    num_experts = report["trial"]["layers"] * report["trial"]["experts"]
    highest = 0.0
    for side, account in report["sides"].items():
        curve = account["curve"]
        tokens_k = [tokens / 1000 for tokens in curve["tokens"]]
        line: dict[str, Any] = {
            "color": SIDE_COLORS[side.removesuffix(AS_SERVED)],
            "linestyle": ":" if side.endswith(AS_SERVED) else "-",
            "linewidth": 1.5,
        }
        highest = max(highest, curve["loss"][int(WARM_UP_SHARE * len(tokens_k))])
        over_loss.plot(tokens_k, curve["loss"], label=side, **line)
        over_balance.plot(tokens_k, [min(layers) for layers in curve["balancedness"]], **line)
        over_dead.plot(tokens_k, [sum(layers) / num_experts for layers in curve["dead"]], **line)
    over_loss.set_ylim(top=highest)
    over_loss.set_ylabel("held-out loss, nats per token")
    over_balance.set_ylim(0, 1.02)
    over_balance.set_ylabel("balancedness of the worst layer")
    over_dead.set_ylim(0, 1)
    over_dead.set_ylabel("share of experts that are dead, or nearly")
    over_balance.set_xlabel("thousands of tokens trained on")
    figure.legend(loc="outside upper center", ncols=len(report["sides"]), frameon=False, fontsize=9)
    save(figure, path)
