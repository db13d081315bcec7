"""Stop strings on a stream of text: what may be shown, and when to end. Pure; knows nothing of tokens.

Invariant: how the text is cut into pieces changes neither what is shown in all nor which stop string ends it.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Holds back text that may be the beginning of a stop string until it is clear that it is not."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> str:
        """The text that can be shown now. Once `matched` is set nothing more may be pushed."""
        assert self.matched is None
        text = self._held + text
        # The match that ends first, and of those the one that begins first: as if characters came one by one.
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            end, start, self.matched = min(ends)
            self._held = ""
            return text[: end if self._include else start]
        shown = len(text) - self._longest_beginning(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, at the text's natural end."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
