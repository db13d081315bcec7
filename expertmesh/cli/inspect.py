"""`expertmesh inspect`: which experts fire for which text. Needs no mesh: the model reads in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from expertmesh.checkpoint.source import resolve
from expertmesh.cli.console import stderr, stdout, steps_shown
from expertmesh.cli.heatmap import draw
from expertmesh.cli.options import AsJson
from expertmesh.errors import ConfigError
from expertmesh.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expertmesh.inspect.findings import Findings, LayerFindings
    from expertmesh.inspect.texts import Domain
    from expertmesh.inspect.watch import Reader

_NAMED = 4
"""Experts that are named in a cell; of more, how many there are."""


def inspect(
    model: Annotated[str, typer.Argument(help='A checkpoint folder, a hub id or "tiny".')],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILES]...", help="What follows --text FILE.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILES...", help="Text in UTF-8, a domain for each file, or for each folder with its files."
        ),
    ] = None,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with pictures that explains itself.")] = None,
    layers: Annotated[str, typer.Option(help="MoE layers to tell of, from 0, such as 0,3-5.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to read of each domain.")] = 8192,
    dtype: Annotated[str | None, typer.Option(help="To compute in; the checkpoint's own unless given.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute, in torch's words.")] = "cpu",
) -> None:
    """Read texts with a model, and tell which experts fire for which, layer by layer.

    Example:

        expertmesh inspect tiny --text prose.txt code.py --html report.html
    """
    from expertmesh.inspect.page import write_page
    from expertmesh.inspect.texts import read_domains
    from expertmesh.inspect.watch import load_reader

    paths = [*(text or ()), *(more or ())]
    if not paths:
        raise ConfigError("--text is missing: name one file of text, or better one for each kind of text")
    if html is not None and not html.parent.is_dir():
        raise ConfigError(f"--html: there is no folder {html.parent}")
    domains = read_domains(paths)
    with steps_shown() as show:
        show(Progress(phase=f"loading {model}"))
        folder = resolve(model)
        reader = load_reader(folder, dtype=dtype, device=device)
        numbers = parse_layers(layers, len(reader.num_experts))
        name = folder.name if Path(model).is_dir() else model
        findings = _read(name, reader, domains, numbers, max_tokens, show)
    if html is not None:
        write_page(findings, html)
        stderr.print(f"wrote {html}", style="dim", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(findings.to_json()))
    else:
        _show(findings)


def _read(
    model: str,
    reader: Reader,
    domains: Sequence[Domain],
    numbers: Sequence[int],
    max_tokens: int,
    show: Callable[[Progress], None],
) -> Findings:
    from expertmesh.inspect.findings import Findings, find

    readings = []
    for domain in domains:

        def report(done: int, total: int, name: str = domain.name) -> None:
            show(Progress(phase=f"reading {name}", done=done, total=total))

        readings.append(reader.read(domain, max_tokens, report))
    reached = [number for number in numbers if all(number in reading.layers for reading in readings)]
    if not reached:
        raise ConfigError("--layers: none of these works on the text's own tokens; leave the option out to see others")
    found: list[LayerFindings] = []
    for layer in find(reader.num_experts, readings, reached, reader.codec):
        found.append(layer)
        show(Progress(phase="looking at layers", done=len(found), total=len(reached)))
    tokens = {reading.domain: len(reading.ids_T) for reading in readings}
    return Findings(model=model, tokens=tokens, layers=tuple(found))


def parse_layers(text: str, num_layers: int) -> list[int]:
    """Layer numbers from words such as "0,3-5"; of none, all layers. Raises ConfigError for what there is not."""
    if not text.strip():
        return list(range(num_layers))
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise ConfigError(f"--layers {text!r}: write numbers and ranges, such as 0,3-5")
        chosen.update(range(int(first), min(int(last or first), num_layers) + 1))
    if not chosen or max(chosen) >= num_layers:
        raise ConfigError(f"--layers {text!r}: the model has MoE layers 0 to {num_layers - 1}")
    return sorted(chosen)


def _show(findings: Findings) -> None:
    counts = ", ".join(f"{count:,} of {domain}" for domain, count in findings.tokens.items())
    first = findings.layers[0]
    stdout.print(
        f"{findings.model}: {len(findings.layers)} MoE layers of {first.num_experts} experts, {first.k} for each token;"
        f" tokens read: {counts}",
        highlight=False,
        markup=False,
    )
    numbers = [layer.layer for layer in findings.layers]
    for place, domain in enumerate(findings.tokens):
        shares = [layer.domains[place].shares for layer in findings.layers]
        stdout.print(draw(shares, title=f"\n{domain}", numbers=numbers, width=stdout.width))
    stdout.print(_table(findings))
    stdout.print(
        "\nown: what of a domain goes to the experts that serve it more than any other"
        + (f" (by chance {1 / len(findings.tokens):.0%})" if len(findings.tokens) > 1 else "")
        + "; balance: mean over busiest expert; dead: no token, nearly: at most a tenth of an even share; overloaded: "
        "twice an even share or more; twins: experts that get the same tokens; sure: the first choice's weight",
        style="dim",
        highlight=False,
    )
    if not findings.is_enough:
        stdout.print("Too little text to call an expert dead: give more, or raise --max-tokens.", style="yellow")


def _table(findings: Findings) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    is_compared = len(findings.tokens) > 1
    owns = [f"own {domain}" for domain in findings.tokens] if is_compared else []
    for column in ("layer", *owns, "balance", "sure"):
        table.add_column(column, justify="right")
    for column in ("dead", "nearly", "overloaded", "twins"):
        table.add_column(column)
    for layer in findings.layers:
        table.add_row(
            str(layer.layer),
            *(f"{use.own_share:.0%}" for use in layer.domains if is_compared),
            f"{layer.balancedness:.2f}",
            f"{layer.confidence:.0%}",
            _some([str(expert) for expert in layer.dead]),
            _some([str(expert) for expert in layer.nearly_dead]),
            _some([str(expert) for expert in layer.overloaded]),
            _some(["{}={}".format(*pair.experts) for pair in layer.twins]),
        )
    return table


def _some(names: list[str]) -> str:
    return " ".join(names) if len(names) <= _NAMED else f"{len(names)}: {' '.join(names[: _NAMED - 1])} ..."
