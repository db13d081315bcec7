"""`expertmesh certs`: what a mesh needs for mutual TLS, for those who have no authority of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertmesh.cli.console import stderr, stdout


def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the authority is, or is to be.")],
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the certificate is valid.")] = 90,
    renew: Annotated[bool, typer.Option(help="Another certificate under the authority that is there.")] = False,
) -> None:
    """Make a certificate authority, and a certificate with which the nodes of a mesh know each other.

    All nodes have the same one, in DIR/node: copy that folder to the same path on each, and nothing else of DIR. A
    renewed certificate is copied there again; routers and hosts take it up by themselves and break no connection.

    Examples:

        expertmesh certs ~/.expertmesh/tls

        expertmesh certs ~/.expertmesh/tls --renew --days 30
    """
    from expertmesh.authority import Authority

    authority = Authority(folder.expanduser().absolute())
    if not renew:
        authority.make()
    valid_until = authority.issue(days)
    files = authority.files
    node = Path(files.key).parent
    stderr.print(
        f"{node} holds a certificate until {valid_until:%Y-%m-%d}: copy it to the same path on every machine.\n"
        f"{authority.key_file} can make others: keep it to this machine.",
        highlight=False,
        soft_wrap=True,
    )
    if not renew:
        stderr.print("In the config, among its args:\n", highlight=False)
        stdout.print(
            "network:\n"
            "  listen: node\n"
            "  tls:\n"
            f"    ca: {files.ca}\n"
            f"    certificate: {files.certificate}\n"
            f"    key: {files.key}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
