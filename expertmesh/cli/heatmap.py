"""Which experts are busy, drawn in a terminal: one row per MoE layer, one cell per expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

_COLD, _WARM, _HOT = (28, 32, 58), (190, 60, 90), (255, 220, 120)
_SHADES = " ·░▒▓█"


def draw(
    layers: Sequence[Sequence[float]],
    *,
    title: str,
    replicas: Sequence[Sequence[int]] | None = None,
    numbers: Sequence[int] | None = None,
    width: int | None = None,
) -> Text:
    """The heat map of `layers[layer][expert]` loads: color for the eye, shade where there is no color.

    Each cell is the expert's load over the layer's even share; 3 times that, and more, is the hottest shade. With
    `replicas`, a cell shows how many there are if it is not one. `numbers` are the layers' own, if not from 0. Where
    the experts of a layer need more than `width` columns, a cell stands for several: the busiest of them.
    """
    most = max((len(loads) for loads in layers), default=0)
    columns = max(1, (width - len("layer 00 ")) // 2) if width else most
    group = -(-most // columns) if most else 1
    picture = Text(title + (f" (a cell: the busiest of {group})" if group > 1 else "") + "\n", no_wrap=True)
    for row, loads in enumerate(layers):
        even = sum(loads) / len(loads) if loads else 0
        picture.append(f"layer {numbers[row] if numbers else row:<2} ", style="dim")
        for start in range(0, len(loads), group):
            expert = max(range(start, min(start + group, len(loads))), key=loads.__getitem__)
            heat = min(1.0, loads[expert] / (3 * even)) if even else 0.0
            shade = _SHADES[round(heat * (len(_SHADES) - 1))]
            mark = shade if replicas is None else _mark(replicas[row][expert], shade)
            picture.append(shade + mark, style=f"{_rgb(_blend(heat))} on {_rgb(_COLD)}")
        picture.append("\n")
    return picture


def _mark(replicas: int, shade: str) -> str:
    """One character for a number of replicas."""
    return {0: "!", 1: shade}.get(replicas) or (str(replicas) if replicas < 10 else "+")


def _blend(heat: float) -> tuple[int, ...]:
    """From cold over warm to hot."""
    low, high, part = (_COLD, _WARM, heat * 2) if heat < 0.5 else (_WARM, _HOT, heat * 2 - 1)
    return tuple(round(a + (b - a) * part) for a, b in zip(low, high, strict=True))


def _rgb(color: tuple[int, ...]) -> str:
    return f"rgb({','.join(map(str, color))})"


def busiest(loads: Sequence[float], count: int = 3) -> list[int]:
    """The experts with most load, busiest first."""
    return sorted(range(len(loads)), key=lambda expert: (-loads[expert], expert))[:count]
