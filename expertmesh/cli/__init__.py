"""The `expertmesh` command. Each command is a module; this one puts them together.

Errors that a person can mend are one line on standard error with exit code 2; progress goes to standard error too, so
that standard output holds what was asked for and nothing else.
"""

from __future__ import annotations

import sys

import typer

from expertmesh.cli import (
    bench,
    certs,
    chaos,
    decisions,
    demo,
    inspect,
    key,
    placement,
    plan,
    scale,
    serve,
    status,
    top,
    trace,
)
from expertmesh.cli.console import stderr
from expertmesh.errors import ExpertMeshError

app = typer.Typer(
    name="expertmesh",
    help="Serve Mixture-of-Experts models with their experts as elastic services on a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve.serve)
app.command()(status.status)
app.command()(top.top)
app.command()(placement.placement)
app.command()(decisions.decisions)
app.command()(scale.scale)
app.command()(scale.drain)
app.command()(scale.rebalance)
app.command()(plan.plan)
app.command()(certs.certs)
app.command()(key.key)
app.command()(demo.demo)
app.command()(inspect.inspect)
app.add_typer(bench.app, name="bench")
app.add_typer(chaos.app, name="chaos")
app.add_typer(trace.app, name="trace")


def main() -> None:
    """The console script."""
    try:
        app()
    except ExpertMeshError as error:
        stderr.print(f"expertmesh: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
