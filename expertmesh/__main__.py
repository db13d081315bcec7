"""`python -m expertmesh` is the `expertmesh` command."""

from __future__ import annotations

from expertmesh.cli import main

main()
