"""The page's pictures, as SVG to be put into HTML. Colors come from the page's style sheet.

Pure. Knows no model: a picture gets numbers and names. A picture is drawn to be read at a phone's width; a wider one
scrolls. Invariant: a name from outside never becomes markup.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from expertmesh.inspect.palette import STEPS, heat_class, side_class

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LEFT = 34
"""Room for the names of rows."""

_WIDTH = 292
"""Of a phone, without margins."""

_MOST_TITLED = 2048
"""Cells of a heat map with titles of their own to point at; with more, a page would take long to open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values of one kind, for each row of a picture (or each bin of a histogram)."""

    name: str
    css: str
    values: Sequence[float]


def heat_map(loads: Sequence[Sequence[float]], rows: Sequence[int], label: str) -> Markup:
    """A row for each layer and a cell for each expert: its load over an even share."""
    return _cells(loads, rows, label, heat_class, lambda load: f"{load:.2f} times an even share")


def difference_map(differences: Sequence[Sequence[float]], rows: Sequence[int], label: str) -> Markup:
    """The same for differences in even shares."""
    return _cells(differences, rows, label, side_class, lambda much: f"{much:+.2f} even shares")


def ramp(kind: str) -> Markup:
    """The colors of heat maps in their order, for a legend: kind "h" or "v"."""
    cells = "".join(f'<rect class="{kind}{n}" x="{n * 14}" width="14" height="10"/>' for n in range(STEPS + 1))
    return Markup(f'<svg class="ramp" viewBox="0 0 {(STEPS + 1) * 14} 10" aria-hidden="true">{cells}</svg>')


def load_strip(loads: Sequence[Sequence[float]], rows: Sequence[int], low: float, high: float, label: str) -> Markup:
    """A row for each layer, a dot for each expert at its load; up to `low` and from `high` on the ground is marked."""
    most = max(high * 1.25, *(max(layer) for layer in loads)) * 1.04
    pitch = _pitch(len(rows), 26)
    height = pitch * len(rows)

    def at(load: float) -> float:
        return round(_LEFT + load / most * (_WIDTH - _LEFT), 1)

    parts = [
        f'<rect class="cold-ground" x="{_LEFT}" width="{at(low) - _LEFT:.1f}" height="{height}"/>',
        f'<rect class="hot-ground" x="{at(high)}" width="{_WIDTH - at(high):.1f}" height="{height}"/>',
        f'<line class="mark" x1="{at(1)}" x2="{at(1)}" y2="{height}"/>',
    ]
    for number, (row, layer) in enumerate(zip(rows, loads, strict=True)):
        y = pitch * (number + 0.5)
        parts.append(_row_name(row, y))
        for expert, load in enumerate(layer):
            css = "dot cold" if load <= low else "dot hot" if load >= high else "dot"
            title = f"layer {row}, expert {expert}: {load:.2f} times an even share"
            parts.append(f'<circle class="{css}" cx="{at(load)}" cy="{y}" r="4"><title>{title}</title></circle>')
    ticks = [(0.0, "0"), (1.0, "even share"), *((float(n), f"{n}×") for n in range(2, int(most) + 1))]
    parts += [_tick(at(value), height, text) for value, text in _spread(ticks, most)]
    return _picture(parts, _WIDTH, height + 18, label)


def dot_plot(
    series: Sequence[Series], rows: Sequence[int], label: str, marks: Sequence[tuple[float, str]] = ()
) -> Markup:
    """A row for each layer, a dot for each series at its value from 0 to 1; `marks` are lines across, with a word."""
    pitch = _pitch(len(rows), 24)
    height = pitch * len(rows)

    def at(value: float) -> float:
        return round(_LEFT + 6 + value * (_WIDTH - _LEFT - 18), 1)

    parts = [f'<line class="mark" x1="{at(v)}" x2="{at(v)}" y2="{height}"/>' for v, _ in marks]
    for number, row in enumerate(rows):
        y = pitch * (number + 0.5)
        parts += [_row_name(row, y), f'<line class="rule" x1="{at(0)}" x2="{at(1)}" y1="{y}" y2="{y}"/>']
        parts += [
            f'<circle class="dot {one.css}" cx="{at(one.values[number])}" cy="{y}" r="5">'
            f"<title>{escape(one.name)}, layer {row}: {one.values[number]:.2f}</title></circle>"
            for one in series
        ]
    ends = [(end, f"{end:.0f}") for end in (0.0, 1.0) if all(abs(end - value) > 0.2 for value, _ in marks)]
    parts += [_tick(at(value), height, text) for value, text in (*ends, *marks)]
    return _picture(parts, _WIDTH, height + 18, label)


def histogram(series: Sequence[Series], ends: tuple[str, str], label: str) -> Markup:
    """Outlines over one another, with the ends of the axis named. All values are of at most one."""
    width, height = 160, 74
    most = max(max(one.values) for one in series) or 1.0
    parts = [f'<line class="rule" x1="0" x2="{width}" y1="{height}" y2="{height}"/>']
    for one in series:
        step = width / len(one.values)
        path = f"M0 {height}"
        for number, value in enumerate(one.values):
            path += f"V{height - value / most * (height - 6):.1f}H{(number + 1) * step:.1f}"
        title = f"<title>{escape(one.name)}</title>"
        parts.append(f'<path class="outline {one.css}" d="{path}V{height}Z">{title}</path>')
    parts.append(f'<text x="0" y="{height + 12}">{escape(ends[0])}</text>')
    parts.append(f'<text class="end" x="{width}" y="{height + 12}">{escape(ends[1])}</text>')
    return _picture(parts, width, height + 16, label)


def _cells(
    values: Sequence[Sequence[float]],
    rows: Sequence[int],
    label: str,
    css: Callable[[float], str],
    word: Callable[[float], str],
) -> Markup:
    most = max(map(len, values))
    width = round(min(18.0, max(3.0, (_WIDTH - _LEFT) / most)), 2)
    height = _pitch(len(rows), 18)
    is_titled = sum(map(len, values)) <= _MOST_TITLED
    gap = 1 if width > 6 else 0
    size = f'width="{width - gap:.2f}" height="{height - gap}"'
    parts: list[str] = []
    for number, (row, layer) in enumerate(zip(rows, values, strict=True)):
        y = number * height
        parts.append(_row_name(row, y + height / 2))
        for expert, value in enumerate(layer):
            box = f'class="{css(value)}" x="{_LEFT + expert * width:.1f}" y="{y}" {size}'
            title = f"<title>layer {row}, expert {expert}: {word(value)}</title>"
            parts.append(f"<rect {box}>{title}</rect>" if is_titled else f"<rect {box}/>")
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n * width >= 30)
    parts += [
        f'<text class="mid" x="{_LEFT + (n + 0.5) * width:.1f}" y="{len(rows) * height + 11}">{n}</text>'
        for n in range(0, most, every)
    ]
    return _picture(parts, round(_LEFT + most * width) + 1, len(rows) * height + 15, label)


def _pitch(rows: int, comfortable: int) -> int:
    """The height of a row: less where there are many."""
    return comfortable if rows <= 16 else max(10, comfortable // 2)


def _row_name(row: int, y: float) -> str:
    return f'<text class="end" x="{_LEFT - 7}" y="{y + 3.5:.1f}">{row}</text>'


def _tick(x: float, height: float, text: str) -> str:
    return f'<text class="mid" x="{x}" y="{height + 13}">{escape(text)}</text>'


def _spread(ticks: list[tuple[float, str]], most: float) -> list[tuple[float, str]]:
    """Those that do not run into the one before."""
    kept: list[tuple[float, str]] = []
    for value, text in ticks:
        if not kept or (value - kept[-1][0]) / most > 0.13:
            kept.append((value, text))
    return kept


def _picture(parts: Sequence[str], width: int, height: int, label: str) -> Markup:
    size = f'viewBox="0 0 {width} {height}" style="min-width:{width}px;max-width:{width * 1.45:.0f}px"'
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {size}>{"".join(parts)}</svg>')
