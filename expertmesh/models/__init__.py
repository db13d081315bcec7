"""The model that ships in the package, and the text that goes with it.

Owns where those files are. Does not load the model: the folder is a plain transformers checkpoint. Invariant: importing
this costs nothing, and `DOMAINS` is the order in which every list of domains comes.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

DOMAINS: Final = ("scripture", "dictionary", "python")

PROMPTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "scripture": "And the LORD spake unto Moses, saying,",
        "dictionary": "lily\n    n 1: any of",
        "python": 'class Reader:\n    """Read',
    }
)
"""For each domain the opening of a text which the model continues recognisably."""


def tiny_path() -> Path:
    """Return the folder of the tiny model."""
    return Path(__file__).parent / "tiny"


def heldout(domain: str) -> str:
    """Return a sample, about 20 KB, of the domain's text that the model was not trained on.

    Raises ValueError for an unknown domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain {domain!r} is none of {', '.join(DOMAINS)}")
    return (tiny_path() / "heldout" / f"{domain}.txt").read_text(encoding="utf-8")
