"""Routing traces: record which experts fired, make up such loads, simulate the control plane on them, replay them.

Reads in the order format, recorder, synthetic, simulate, replay.
"""

from __future__ import annotations

from pathlib import Path


def shipped() -> list[Path]:
    """The traces that come with the package: made-up loads of every kind, and the tiny model's, recorded."""
    return sorted((Path(__file__).parent / "data").glob("*.trace"))
