"""`expertmesh serve`: deploy a mesh, say when it is ready, run until told to stop, drain."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.cli.console import stderr, stdout, steps_shown


def serve(
    target: Annotated[
        str, typer.Argument(metavar="CONFIG|MODEL", help="A YAML config, a checkpoint folder, a hub id, or `tiny`.")
    ],
    hosts: Annotated[int | None, typer.Option(min=1, help="Host processes (for MODEL). [default: 2]")] = None,
    min_replicas: Annotated[
        int | None, typer.Option(min=1, help="Ready copies of every expert (for MODEL). [default: 1]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (for MODEL). [default: the checkpoint's]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="HTTP port. [default: the config's, or 8000]")
    ] = None,
) -> None:
    """Serve a model: start or join Ray, deploy, print `ready URL`, run until Ctrl-C, drain.

    Examples:

        expertmesh serve tiny --hosts 3

        expertmesh serve configs/olmoe.yaml --port 9000
    """
    from expertmesh.config_file import load_config  # late: `--help` need not wait for Ray
    from expertmesh.deploy import deployed, for_model

    if target.endswith((".yaml", ".yml")):
        if hosts or min_replicas or dtype:
            raise typer.BadParameter("--hosts, --min-replicas and --dtype go with a MODEL; a config has its own")
        file = load_config(Path(target))
    else:
        file = for_model(target, hosts=hosts or 2, min_replicas=min_replicas or 1, dtype=dtype)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends a start that is under way, as Ctrl-C does
    with contextlib.ExitStack() as stack:
        with steps_shown() as show:
            url = stack.enter_context(deployed(file, port=port, report=show))
        stdout.print(f"ready {url}", soft_wrap=True, highlight=False)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        stderr.print("draining", style="dim")
