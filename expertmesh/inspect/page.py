"""Findings as one HTML page that stands alone: no script, no font and no picture from elsewhere.

Owns what is shown and in what order; pictures.py draws and report.html.j2 has the words. Invariant: the same findings
give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from expertmesh.errors import ConfigError
from expertmesh.inspect import palette, pictures, twins, typical
from expertmesh.inspect.findings import NEARLY_DEAD, OVERLOADED
from expertmesh.inspect.pictures import Series
from expertmesh.inspect.summary import mean_distances, summarize

if TYPE_CHECKING:
    from collections.abc import Callable

    from expertmesh.inspect.findings import DomainUse, Findings, LayerFindings

_HERE = Path(__file__).parent

EXPERTS_SHOWN = 32
"""Of a layer, with their typical tokens: those with the most typical ones."""

_MOST_IN_HALF = 96
"""Experts of which a heat map fits into half of the page."""

_INVISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})


def write_page(findings: Findings, path: Path) -> None:
    """Raises ConfigError where the file cannot be written."""
    try:
        path.write_text(render_page(findings), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html: cannot write {path}: {error.strerror}") from error


def render_page(findings: Findings) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"visible": visible, "running": _running, "percent": _percent}
    return environment.get_template("report.html.j2").render(_context(findings))


def visible(token: str) -> str:
    """A token with its blanks to be seen, and with nothing else that is not."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in token.translate(_INVISIBLE))


def _running(text: str) -> str:
    """Text around a token, on one line."""
    return "".join(char if char.isprintable() else "↵" if char == "\n" else " " for char in text)


def _percent(part: float) -> str:
    return f"{100 * part:.0f}%"


def _context(findings: Findings) -> dict[str, Any]:
    layers, names = findings.layers, list(findings.tokens)
    rows = [layer.layer for layer in layers]
    colors = [palette.domain_class(place) for place in range(len(names))]
    return {
        "style": Markup(palette.style()) + Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        "findings": findings,
        "domains": list(zip(names, colors, findings.tokens.values(), strict=True)),
        "sizes": _sizes([layer.num_experts for layer in layers]),
        "is_wide": max(layer.num_experts for layer in layers) > _MOST_IN_HALF,
        "choices": _sizes([layer.k for layer in layers]),
        "points": summarize(findings),
        "heat_ramp": pictures.ramp("h"),
        "side_ramp": pictures.ramp("v"),
        "heat_maps": [
            (name, pictures.heat_map(_loads(layers, place), rows, f"Load of every expert for {name}"))
            for place, name in enumerate(names)
        ],
        "difference_maps": _difference_maps(findings, rows),
        "distances": mean_distances(findings),
        "own_plot": pictures.dot_plot(
            _series(findings, colors, lambda use: use.own_share),
            rows,
            "Share that goes to a domain's own experts",
            [(1 / len(names), "by chance")],
        ),
        "load_strip": pictures.load_strip(
            [layer.loads for layer in layers], rows, NEARLY_DEAD, OVERLOADED, "Load of every expert over an even share"
        ),
        "balance_plot": pictures.dot_plot(
            [
                *_series(findings, colors, lambda use: use.balancedness),
                Series(name="all texts", css="all", values=[layer.balancedness for layer in layers]),
            ],
            rows,
            "Balancedness of every layer",
        ),
        "overlap_plot": pictures.dot_plot(
            _series(findings, colors, lambda use: use.overlap or 0.0),
            rows,
            "Choices that neighbouring tokens share",
            [(layers[0].k / layers[0].num_experts, "by chance")],
        ),
        "extremes": [
            (layer, *(pick(range(layer.num_experts), key=layer.loads.__getitem__) for pick in (min, max)))
            for layer in layers
        ],
        "histograms": [(layer, _histogram(layer, colors)) for layer in layers],
        "pairs": [(layer, pair) for layer in layers for pair in layer.closest],
        "together": twins.TOGETHER,
        "alike": twins.ALIKE,
        "experts": [(layer, _experts(layer)) for layer in layers],
        "experts_shown": EXPERTS_SHOWN,
        "least": typical.LEAST,
    }


def _series(findings: Findings, colors: list[str], value: Callable[[DomainUse], float]) -> list[Series]:
    """For each domain a value of each layer."""
    return [
        Series(name=name, css=css, values=[value(layer.domains[place]) for layer in findings.layers])
        for place, (name, css) in enumerate(zip(findings.tokens, colors, strict=True))
    ]


def _sizes(values: list[int]) -> str:
    """A number that all layers have, or from where to where."""
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def _loads(layers: tuple[LayerFindings, ...], place: int) -> list[list[float]]:
    """A domain's loads over even shares, by layer and expert."""
    return [[share * layer.num_experts for share in layer.domains[place].shares] for layer in layers]


def _difference_maps(findings: Findings, rows: list[int]) -> list[tuple[str, str, Markup]]:
    """(a domain, what it is compared with, picture): of two domains once, of more each with the mean of the others."""
    names = list(findings.tokens)
    loads = [_loads(findings.layers, place) for place in range(len(names))]
    compared = {0: 1, 1: 0, 2: 1}.get(len(names), len(names))
    maps = []
    for place, name in enumerate(names[:compared]):
        others = [domain for n, domain in enumerate(loads) if n != place]
        other = names[1] if len(names) == 2 else "the others"
        differences = [
            [
                own - sum(them) / len(them)
                for own, *them in zip(loads[place][row], *(each[row] for each in others), strict=True)
            ]
            for row in range(len(rows))
        ]
        maps.append((name, other, pictures.difference_map(differences, rows, f"{name} against {other}")))
    return maps


def _histogram(layer: LayerFindings, colors: list[str]) -> Markup:
    low = layer.domains[0].confidence.low
    series = [
        Series(name=use.domain, css=css, values=use.confidence.shares)
        for use, css in zip(layer.domains, colors, strict=True)
    ]
    return pictures.histogram(series, (f"{low:.0%}", "100%"), f"Gate confidence in layer {layer.layer}")


def _experts(layer: LayerFindings) -> list[int]:
    """Those to show, in order."""

    def strongest(expert: int) -> float:
        return max((token.lift for token in layer.typical[expert]), default=0.0)

    told = sorted(range(layer.num_experts), key=lambda expert: (-strongest(expert), expert))
    return sorted(told[:EXPERTS_SHOWN])
