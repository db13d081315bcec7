"""The colors of the page, for light and for dark surroundings, as style sheets.

Classes: h0 to h12 for how hot, v0 to v12 for which of two sides (v6 is neither), d0 to d7 for domains. Each sets
the custom property --c, which the style sheet paints with. Domains' colors differ for the color-blind too.
"""

from __future__ import annotations

from itertools import pairwise

STEPS = 12
"""Of a ramp, which so has one color more."""

_HEAT = (
    ("#f3efe6", "#fbdfa6", "#f6ae62", "#e4694b", "#ab2c53", "#561748"),
    ("#20222f", "#3a2a63", "#7a2f7b", "#c8456c", "#f58b58", "#fde6a8"),
)
_SIDES = (
    ("#1d5fa8", "#7fb0dc", "#f3efe6", "#efb07a", "#b4510f"),
    ("#6fb9ff", "#33608f", "#20222f", "#8f5a2c", "#ffb066"),
)
_DOMAINS = (
    ("#2f6fb2", "#d1660f", "#1c8a63", "#8a4fb5", "#c0354d", "#7a6a1f", "#2a8c9c", "#6b6f78"),
    ("#74b3f5", "#ff9f4f", "#4fd0a0", "#c79af0", "#ff7d92", "#d9c35a", "#5fd3e3", "#b3b8c2"),
)
"""Each: what light surroundings take, then what dark ones do."""


def style() -> str:
    """All classes; the dark colors where the reader's device asks for them."""
    light, dark = ("".join(_rules(theme)) for theme in (0, 1))
    return f"{light}\n@media (prefers-color-scheme: dark) {{{dark}}}"


def heat_class(load: float) -> str:
    """For a load over an even share: 3 times that and more is the hottest. Nothing at all has a look of its own."""
    return f"h{_step(load / 3)}" if load else "none"


def side_class(difference: float) -> str:
    """For a difference in even shares: 1.5 and more is the strongest."""
    return f"v{_step(difference / 3 + 0.5)}"


def domain_class(place: int) -> str:
    return f"d{place % len(_DOMAINS[0])}"


def _step(part: float) -> int:
    return round(min(1.0, max(0.0, part)) * STEPS)


def _rules(theme: int) -> list[str]:
    ramps = {"h": _ramp(_HEAT[theme]), "v": _ramp(_SIDES[theme]), "d": list(_DOMAINS[theme])}
    return [f".{name}{step}{{--c:{color}}}" for name, colors in ramps.items() for step, color in enumerate(colors)]


def _ramp(anchors: tuple[str, ...]) -> list[str]:
    """STEPS + 1 colors, evenly between the anchors."""
    between = list(pairwise(anchors))
    colors = []
    for step in range(STEPS + 1):
        at = step / STEPS * len(between)
        number = min(int(at), len(between) - 1)
        colors.append(_blend(*between[number], at - number))
    return colors


def _blend(one: str, other: str, part: float) -> str:
    parts = zip(bytes.fromhex(one[1:]), bytes.fromhex(other[1:]), strict=True)
    return "#" + bytes(round(a + (b - a) * part) for a, b in parts).hex()
