"""The recorder: what exchanges chose, whole or counted as missing, whoever takes it and however slowly."""

from __future__ import annotations

import threading

import numpy as np

from expertmesh.trace.format import Record, TraceDecoder, TraceHeader, encode_header
from expertmesh.trace.recorder import TraceRecorder

HEADER = TraceHeader(model="m", num_experts=(4, 4), top_k=2, content="choices")
INDEX_TK = np.array([[0, 3], [1, 2]])


class Ticking:
    """A clock that goes on by one second each time it is read."""

    def __init__(self) -> None:
        self.now_s = 99.0

    def monotonic(self) -> float:
        self.now_s += 1
        return self.now_s

    def wall(self) -> float:
        raise NotImplementedError


def decoded(*taken: bytes) -> tuple[TraceDecoder, list[Record]]:
    decoder = TraceDecoder("x")
    records = list(decoder.feed(encode_header(HEADER) + b"".join(taken)))
    assert decoder.num_bytes_left == 0
    return decoder, records


def test_exchanges_are_recorded_with_the_time_since_the_start() -> None:
    recorder = TraceRecorder(HEADER, Ticking())
    recorder.record(0, INDEX_TK)
    first = recorder.take()
    recorder.record(1, INDEX_TK[:1])
    _, records = decoded(first, recorder.take())
    assert [(r.time_s, r.layer, r.index_TK.tolist()) for r in records] == [
        (1.0, 0, INDEX_TK.tolist()),
        (2.0, 1, INDEX_TK[:1].tolist()),
    ]
    assert recorder.take() == b""


def test_no_tokens_are_no_record() -> None:
    recorder = TraceRecorder(HEADER, Ticking())
    recorder.record(0, INDEX_TK[:0])
    assert recorder.take() == b""


def test_exchanges_of_another_gate_are_left_out_and_counted() -> None:
    recorder = TraceRecorder(HEADER, Ticking())
    recorder.record(0, np.array([[0, 3], [1, -1]]))
    recorder.record(0, np.array([[0, 3, 2]]))
    recorder.record(0, INDEX_TK)
    decoder, records = decoded(recorder.take())
    assert [record.index_TK.tolist() for record in records] == [INDEX_TK.tolist()]
    assert decoder.num_dropped == recorder.num_dropped == 2


def test_what_finds_no_room_is_left_out_and_counted_in_the_trace() -> None:
    recorder = TraceRecorder(HEADER, Ticking(), max_bytes=40)
    for _ in range(10):
        recorder.record(0, INDEX_TK)
    early = recorder.take()
    assert len(early) <= 60
    recorder.record(1, INDEX_TK)
    decoder, records = decoded(early, recorder.take())
    assert recorder.num_dropped == 10 - (len(records) - 1) > 0
    assert decoder.num_dropped == recorder.num_dropped
    assert records[-1].layer == 1


def test_nothing_is_lost_between_the_thread_that_records_and_the_one_that_takes() -> None:
    recorder = TraceRecorder(HEADER, Ticking())
    thread = threading.Thread(target=lambda: [recorder.record(i % 2, INDEX_TK) for i in range(2000)])
    thread.start()
    taken = []
    while thread.is_alive():
        taken.append(recorder.take())
    _, records = decoded(*taken, recorder.take())
    assert [r.layer for r in records] == [i % 2 for i in range(2000)]
