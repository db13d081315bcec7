"""Second opinions: some rows are computed by another replica as well, and the two must agree bit for bit.

Finds a device that computes wrongly without saying so, which nothing else would. Costs the share of all rows that is
computed twice, and no time: the exchange does not wait for it. So it finds a wrong answer after the fact.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from expertmesh.doubt import Doubt
from expertmesh.ids import ExpertId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from expertmesh.ids import HostId
    from expertmesh.transport import LayerRequest


@dataclass(slots=True)
class Case:
    """The same request to several hosts, and what each answered."""

    request: LayerRequest
    rows: dict[HostId, NDArray[np.uint8]] = field(default_factory=dict)
    """[p, bytes] in the order of the request's pairs."""

    def hear(
        self, host: HostId, rows: NDArray[np.uint8], ask: Callable[[Case], bool], doubt: Callable[[Doubt], None]
    ) -> None:
        """Take a host's answer. While there are but two, and they differ, `ask` is to find a third host (whether it
        did); else the ones in the minority are doubted, or all where there is none."""
        self.rows[host] = rows
        if len(self.rows) < 2:
            return
        suspects = list(self._suspects())
        if suspects and len(self.rows) == 2 and ask(self):
            return
        for suspect in suspects:
            doubt(suspect)

    def not_heard(self, doubt: Callable[[Doubt], None]) -> None:
        """A host that was asked has not answered: of two that differ, nobody says which is right."""
        if len(self.rows) == 2:
            for suspect in self._suspects():
                doubt(suspect)

    def _suspects(self) -> Iterator[Doubt]:
        end = 0
        for index, count in zip(self.request.experts, self.request.counts, strict=True):
            start, end = end, end + count
            said = {host: rows[start:end].tobytes() for host, rows in self.rows.items()}
            votes = Counter(said.values())
            if len(votes) == 1:
                continue
            (most, first), (_, second), *_ = votes.most_common()
            for host, answer in said.items():
                if first > second and answer == most:
                    continue
                others = ", ".join(sorted(other for other in said if said[other] != answer))
                expert = ExpertId(self.request.layer, index)
                yield Doubt(expert=expert, host=host, cause=f"its rows differ from those of {others}")
