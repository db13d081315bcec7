"""`expertmesh chaos`: break a mesh on purpose, under load, and see whether it keeps its promises."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.chaos.script import Script
from expertmesh.cli.console import stderr, stdout, steps_shown
from expertmesh.cli.options import AsJson

app = typer.Typer(
    help="Break a mesh on purpose, under load, by a script that can be replayed; check that nobody notices.",
    no_args_is_help=True,
)

Port = Annotated[int, typer.Option(min=1, max=65535, help="For the mesh that is started.")]
Picture = Annotated[Path | None, typer.Option(help="Draw it too, to this file (.svg, .png, .pdf).")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of all that is drawn at random. [default: the script's]")]


@app.command("run")
def run_script(
    script: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="One of ours, see `expertmesh chaos list`, or the path of a .yaml.")
    ],
    as_json: AsJson = False,
    picture: Picture = None,
    seed: Seed = None,
    duration: Annotated[float | None, typer.Option(min=1, help="Seconds; the run ends then.")] = None,
    short: Annotated[bool, typer.Option("--short", help="The script's short form.")] = False,
    port: Port = 8125,
) -> None:
    """Run a fault script: exit code 1 when something that must hold does not.

    Examples:

        expertmesh chaos run kill-hosts --short

        expertmesh chaos run mine.yaml --seed 7 --picture run.svg
    """
    from expertmesh.chaos.script import load_script

    loaded = load_script(script)
    if short:
        loaded = loaded.shortened()
    if duration is not None:
        loaded = loaded.model_copy(update={"duration": duration})
    command = f"expertmesh chaos run {script}" + (" --short" if short else "")
    command += "" if seed is None else f" --seed {seed}"
    command += "" if duration is None else f" --duration {duration:g}"
    _run(loaded, command, as_json=as_json, picture=picture, seed=seed, port=port, failure=None)


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 30,
    as_json: AsJson = False,
    picture: Picture = None,
    seed: Annotated[int | None, typer.Option(min=0, help="[default: another one each time]")] = None,
    port: Port = 8125,
) -> None:
    """Mix faults of all kinds at random. When something fails, write the script that does the same again.

    Example:

        expertmesh chaos soak --minutes 30 --picture soak.svg
    """
    from expertmesh.chaos.script import load_script

    drawn = random.SystemRandom().getrandbits(31) if seed is None else seed
    script = load_script("soak").model_copy(update={"duration": 60 * minutes})
    command = f"expertmesh chaos soak --minutes {minutes:g} --seed {drawn}"
    failure = Path(f"chaos-soak-{drawn}.yaml")
    _run(script, command, as_json=as_json, picture=picture, seed=drawn, port=port, failure=failure)


@app.command("list")
def list_scripts() -> None:
    """The scripts that ship with the package.

    Example:

        expertmesh chaos list
    """
    from expertmesh.chaos.script import load_script, shipped

    for name in shipped():
        stdout.print(f"[bold]{name}[/]: {load_script(name).about}", highlight=False)


def _run(
    script: Script,
    command: str,
    *,
    as_json: bool,
    picture: Path | None,
    seed: int | None,
    port: int,
    failure: Path | None,
) -> None:
    """Run, report, and fail as the oracles say. `failure` is where a run that fails is written, to be run again."""
    from expertmesh.chaos.picture import draw_run
    from expertmesh.chaos.report import replayable, report_of, tables
    from expertmesh.chaos.runner import run

    with steps_shown() as show:
        history = run(script, port=port, report=show, seed=seed)
    report = report_of(history, command)
    if picture is not None:
        draw_run(report, picture)
    if as_json:
        stdout.print_json(json.dumps(report))
    else:
        for table in tables(report):
            stdout.print(table, highlight=False)
    if report["holds"]:
        return
    if failure is not None:
        failure.write_text(replayable(history))
        stderr.print(f"to see it again: expertmesh chaos run {failure}", highlight=False)
    raise typer.Exit(1)
