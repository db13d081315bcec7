"""What each router last said of itself, for those who look at the mesh. Nothing is decided by it.

Knows nothing of what the words mean. Invariant: a router that says nothing for longer than the lease is forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from expertmesh.clock import Clock


class Routers:
    """The last word of each router that was heard of within `lease_s`."""

    def __init__(self, lease_s: float, clock: Clock) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._words: dict[str, tuple[float, Mapping[str, Any]]] = {}

    def heard(self, router: str, statistics: Mapping[str, Any]) -> None:
        """A router says how it goes, in plain JSON values."""
        self._forget()
        self._words[router] = (self._clock.monotonic(), statistics)

    def entries(self) -> list[dict[str, Any]]:
        """One entry for each, in the order of their ids: its last word, and how old that is."""
        self._forget()
        now = self._clock.monotonic()
        return [{"id": router, "age_s": now - at, **said} for router, (at, said) in sorted(self._words.items())]

    def _forget(self) -> None:
        oldest = self._clock.monotonic() - self._lease_s
        self._words = {router: word for router, word in self._words.items() if word[0] >= oldest}
