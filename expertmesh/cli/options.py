"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Url = Annotated[str, typer.Option(help="Where the gateway listens.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
