"""`python -m expertmesh.train compare`: every balance on the same small model, as a table, a file and a picture.

Owns the command and its report. What is compared, and on what terms, is `trial`'s. Invariant: what can be refused is
refused before anything is trained.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from expertmesh.bench.measure import environment
from expertmesh.errors import ConfigError
from expertmesh.train import trial
from expertmesh.train.balance import BALANCES, balance_named
from expertmesh.train.console import bar, fetch
from expertmesh.train.picture import draw, refuse_undrawable
from expertmesh.train.sources import CACHE

DEFAULTS = trial.Trial()


def compare(
    out: Annotated[Path, typer.Option(help="File for the report, JSON.")],
    picture: Annotated[Path | None, typer.Option(help="Draw it too, to this file (.svg, .png, .pdf).")] = None,
    balance: Annotated[
        list[str] | None, typer.Option(help=f"Only this; can be given again. There are {', '.join(BALANCES)}.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each, 768 tokens a step.")] = DEFAULTS.steps,
    seed: Annotated[int, typer.Option(help="Seeds the weights and the batches, the same for all.")] = DEFAULTS.seed,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder that keeps downloads.")] = CACHE,
) -> None:
    """Train a small model under each balance, on the tiny model's data, and report how it uses its experts.

    Where experts choose, the report has two sides: the model as trained, which looks at tokens to come and so can
    neither be served nor be compared by its loss, and as served, where each token takes its own best experts.

    Example: python -m expertmesh.train compare --out balance.json --picture balance.svg
    """
    names = list(dict.fromkeys(balance or BALANCES))
    for name in names:
        balance_named(name)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"out: {out} cannot be written; name a file in a folder that exists")
    if picture is not None:
        refuse_undrawable(picture)
    torch.set_num_threads(threads)
    corpora, splits = fetch(cache)
    text = trial.read(splits)
    terms = trial.Trial(steps=steps, seed=seed)
    sides: dict[str, Any] = {}
    for name in names:
        with bar(f"{name}: ") as show:
            sides |= trial.run(text, terms, name, told=show)
    options = "".join(f" --balance {name}" for name in names) if balance else ""
    report = {
        "experiment": "balance",
        **environment(f"python -m expertmesh.train compare --steps {steps} --seed {seed}{options}"),
        "threads": threads,
        "trial": terms.to_json(text),
        "corpora": {corpus.domain: {"source": corpus.source, "sha256": corpus.sha256} for corpus in corpora},
        "balances": {name: asdict(BALANCES[name]) for name in names},
        "sides": sides,
    }
    out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    Console().print(_table(report))
    if picture is not None:
        draw(report, picture)


def _table(report: dict[str, Any]) -> Table:
    terms = report["trial"]
    table = Table(
        title=f"After {terms['steps']:,} steps, of {terms['heldout_tokens']:,} tokens held out",
        title_style="",
        box=None,
        header_style="dim",
    )
    for column in ("", "loss", "balancedness by layer", f"dead of {terms['experts']} by layer"):
        table.add_column(column, justify="right" if column else "left")
    for side, account in report["sides"].items():
        heldout = account["heldout"]
        balancedness = "  ".join(f"{value:.2f}" for value in heldout["balancedness"])
        table.add_row(side, f"{heldout['loss']:.3f}", balancedness, "  ".join(map(str, heldout["dead"])))
    return table
