"""Recording the choices of live exchanges: a bounded buffer between the exchange and whoever takes the bytes away.

Knows neither where they go nor what an exchange is. Its invariant: recording never holds an exchange up. What finds no
room is left out, and the trace says how much that was.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from expertmesh.trace.format import MAX_RECORD_BYTES, encode_choices, encode_gap

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from expertmesh.clock import Clock
    from expertmesh.trace.format import TraceHeader


class TraceRecorder:
    """Records exchanges from its construction on. `record` and `take` may be called from different threads.

    The bytes taken are records only; a trace begins with `encode_header(header)`, once, whatever number of recorders
    write into it.
    """

    def __init__(self, header: TraceHeader, clock: Clock, max_bytes: int = 2**24) -> None:
        """`max_bytes` is what may wait to be taken."""
        assert header.content == "choices"
        self.header = header
        self._clock = clock
        self._started_s = clock.monotonic()
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._missing = 0
        self.num_dropped = 0
        """Exchanges left out so far."""

    def record(self, layer: int, index_TK: NDArray[np.integer]) -> None:
        """Note one exchange: the experts that its T tokens chose.

        One where a token chose fewer or more experts than the trace's top_k is left out, for it has no place for that.
        """
        if index_TK.size == 0:
            return
        time_s = self._clock.monotonic() - self._started_s
        fits = index_TK.shape[1] == self.header.top_k and index_TK.min() >= 0
        data = encode_choices(self.header, time_s, layer, index_TK) if fits else b""
        with self._lock:
            if not fits or len(self._waiting) + len(data) > self._max_bytes or len(data) > MAX_RECORD_BYTES:
                self._missing += 1
                self.num_dropped += 1
                return
            if self._missing:
                self._waiting += encode_gap(time_s, self._missing)
                self._missing = 0
            self._waiting += data

    def take(self) -> bytes:
        """All that was recorded since the last call; it waits no longer."""
        with self._lock:
            if self._missing:
                self._waiting += encode_gap(self._clock.monotonic() - self._started_s, self._missing)
                self._missing = 0
            taken, self._waiting = self._waiting, bytearray()
        return bytes(taken)
