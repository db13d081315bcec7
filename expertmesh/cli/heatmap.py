"""Which experts fired, drawn in a terminal: one row per MoE layer, one cell per expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

_COLD, _WARM, _HOT = (28, 32, 58), (190, 60, 90), (255, 220, 120)
_SHADES = " ·░▒▓█"


def draw(layers: Sequence[Sequence[float]], *, title: str) -> Text:
    """The heat map of `layers[layer][expert]` loads: color for the eye, shade where there is no color.

    Each cell is the expert's load over the layer's even share; 3 times that, and more, is the hottest shade.
    """
    picture = Text(f"{title}\n", no_wrap=True)
    for number, loads in enumerate(layers):
        even = sum(loads) / len(loads) if loads else 0
        picture.append(f"layer {number:<2} ", style="dim")
        for load in loads:
            heat = min(1.0, load / (3 * even)) if even else 0.0
            shade = _SHADES[round(heat * (len(_SHADES) - 1))]
            picture.append(shade * 2, style=f"{_rgb(_blend(heat))} on {_rgb(_COLD)}")
        picture.append("\n")
    return picture


def _blend(heat: float) -> tuple[int, ...]:
    """From cold over warm to hot."""
    low, high, part = (_COLD, _WARM, heat * 2) if heat < 0.5 else (_WARM, _HOT, heat * 2 - 1)
    return tuple(round(a + (b - a) * part) for a, b in zip(low, high, strict=True))


def _rgb(color: tuple[int, ...]) -> str:
    return f"rgb({','.join(map(str, color))})"


def busiest(loads: Sequence[float], count: int = 3) -> list[int]:
    """The experts with most load, busiest first."""
    return sorted(range(len(loads)), key=lambda expert: (-loads[expert], expert))[:count]
