"""`expertmesh scale`, `drain` and `rebalance`: what an operator orders of a running mesh."""

from __future__ import annotations

from typing import Annotated

import typer

from expertmesh.cli.console import stdout
from expertmesh.cli.options import Url
from expertmesh.client import DEFAULT_URL, order
from expertmesh.errors import ConfigError

_FOLLOW = "`expertmesh top` shows it happen"


def scale(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="A pool of the config.")],
    hosts: Annotated[str, typer.Argument(metavar="N|auto", help="How many hosts, or `auto`: as its load needs.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Have a pool keep N hosts, whatever its load; with `auto`, have it follow its load again.

    Examples:

        expertmesh scale cpu 4

        expertmesh scale cpu auto
    """
    if hosts == "auto":
        order(url, "auto", pool=pool)
        stdout.print(f"pool {pool} follows its load again", highlight=False, markup=False)
        return
    if not (hosts.isascii() and hosts.isdecimal()):
        raise ConfigError(f"hosts: {hosts!r} is neither a number nor `auto`")
    order(url, "scale", pool=pool, hosts=int(hosts))
    stdout.print(f"pool {pool} is being scaled to {int(hosts)} hosts; {_FOLLOW}", highlight=False, markup=False)


def drain(
    host: Annotated[str, typer.Argument(metavar="HOST", help="A host, as `expertmesh status` names it.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Empty a host, its experts first copied elsewhere, then stop it. No request notices; its pool starts another.

    Example:

        expertmesh drain cpu-1
    """
    order(url, "drain", host=host)
    stdout.print(f"host {host} is being drained; {_FOLLOW}", highlight=False, markup=False)


def rebalance(url: Url = DEFAULT_URL) -> None:
    """Weigh the placement against the load now, rather than when its time comes.

    Example:

        expertmesh rebalance
    """
    order(url, "rebalance")
    stdout.print(f"the placement is being weighed; {_FOLLOW}", highlight=False)
