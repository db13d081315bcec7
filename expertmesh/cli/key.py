"""`expertmesh key`: draw an API key for a client of the gateway."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from expertmesh.cli.console import stderr, stdout
from expertmesh.errors import ConfigError


def key(name: Annotated[str, typer.Argument(metavar="NAME", help="Who is to have it.")]) -> None:
    """Draw an API key, and say what to put into the config. It is shown this once: the config has only its hash.

    Once a config has such keys, nobody uses the model without one of them.

    Example:

        expertmesh key alice
    """
    from expertmesh.serve.keys import draw_key, hash_of

    if not name.strip():
        raise ConfigError("name: say whose key it is")
    drawn = draw_key()
    stderr.print("The key, for the client's `Authorization: Bearer` or OPENAI_API_KEY:\n", highlight=False)
    stdout.print(drawn, highlight=False, markup=False, soft_wrap=True)
    stderr.print("\nIn the config, among its args:\n", highlight=False)
    stdout.print(
        f"gateway:\n  api_keys:\n    - {{name: {json.dumps(name)}, sha256: {json.dumps(hash_of(drawn))}}}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
