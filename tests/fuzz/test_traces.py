"""Whatever a trace file holds, it is a trace as far as it goes or a TraceError, in bounded memory and time."""

from __future__ import annotations

import itertools
import struct
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expertmesh.errors import TraceError
from expertmesh.trace import format as trace_format
from expertmesh.trace.format import TraceDecoder, TraceHeader, TraceReader, encode_choices, encode_header, encode_rows
from tests.fuzz.fuzzing import altered, at_most, damaged, edges, fuzzed, outcome

DATA = Path(trace_format.__file__).parent / "data"
SHIPPED = sorted(DATA.glob("*.trace"))
HEADER = TraceHeader(model="m", num_experts=(3, 300), top_k=2, content="choices", origin={"kind": "made", "of": [1]})
RECORDS = b"".join(encode_choices(HEADER, i, i % 2, np.array([[0, 1], [2, 0]])) for i in range(3))
SMALL = encode_header(HEADER) + RECORDS
PLAIN = msgpack.unpackb(encode_header(HEADER))

CONSTANT = 40 * 2**20
"""Bytes for whatever a few bytes say: lists begun within lists, 1,024 deep and of 4,096 places at most."""


def read(data: bytes, piece: int = 2**16) -> TraceError | int:
    """The number of records, or the error."""

    def decode() -> int:
        decoder = TraceDecoder("x")
        for start in range(0, len(data), piece):
            for record in decoder.feed(data[start : start + piece]):
                assert 0 <= record.layer < len(decoder.header.num_experts)
                assert record.rows_E.shape == (decoder.header.num_experts[record.layer],)
                assert record.rows_E.min() >= 0
                if record.index_TK is not None:
                    assert record.index_TK.shape[1] == decoder.header.top_k
        decoder.finish()
        return decoder.num_records

    return outcome(decode, TraceError)


@fuzzed(300)
@given(
    damaged(SMALL) | st.binary(max_size=60) | st.binary(max_size=60).map(lambda noise: SMALL + noise),
    st.integers(1, 99),
)
@example(SMALL, 1)
def test_any_bytes_are_a_trace_or_refused(data, piece) -> None:
    with at_most(CONSTANT):
        at_once = read(data)
    assert str(read(data, piece)) == str(at_once)


@fuzzed(150)
@given(altered(PLAIN))
def test_any_header_is_read_or_refused(header) -> None:
    try:
        packed = msgpack.packb(header)
    except (OverflowError, UnicodeEncodeError, ValueError):
        return  # msgpack cannot say it
    with at_most(CONSTANT):
        read(packed + RECORDS)


@fuzzed(120)
@given(st.lists(altered([1.0, 0, "bytes"]), max_size=3), st.integers(0, 12))
def test_any_record_is_read_or_refused(records, size) -> None:
    packed = []
    for record in records:
        if isinstance(record, list):
            record = [bytes(size) if part == "bytes" else part for part in record]
        try:
            packed.append(msgpack.packb(record))
        except (OverflowError, UnicodeEncodeError, ValueError):
            continue
    read(SMALL + b"".join(packed))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@fuzzed(6)
@given(st.data())
def test_a_damaged_shipped_trace_is_read_as_far_as_it_goes(tmp_path_factory, path, data) -> None:
    start = path.read_bytes()[: 2**15]
    damaged_path = tmp_path_factory.mktemp("trace") / "x.trace"
    damaged_path.write_bytes(data.draw(damaged(start)))
    error = outcome(lambda: sum(1 for _ in TraceReader(damaged_path)), TraceError)
    assert isinstance(error, int | TraceError)


def many(code: bytes, number: int, item: bytes) -> bytes:
    return code + number.to_bytes(2 if code in (b"\xdc", b"\xde") else 4, "big") + item * number


DEEP = 1000
BOMBS = {
    "lists in lists": b"\x91" * 100_000,
    "long lists in lists": b"\xdc\x10\x00" * DEEP,
    "too long a list": b"\xdd\xff\xff\xff\xff",
    "too long a map": b"\xdf\xff\xff\xff\xff",
    "too long a text": b"\xdb\xff\xff\xff\xff",
    "too long bytes": b"\xc6\xff\xff\xff\xff",
    "too long an extension": b"\xc9\xff\xff\xff\xff\x00",
    "many empty lists": many(b"\xdc", 4096, many(b"\xdc", 4096, b"\x90")),
    "many small texts": many(b"\xdc", 4096, many(b"\xdc", 1024, b"\xa3abc")),
    "many maps": many(b"\xdc", 4096, many(b"\xdc", 100, b"\x80")),
    "a deep version": msgpack.packb({"format": "expertmesh-trace"})[:-1].replace(b"\x81", b"\x82")
    + b"e\xa7version" + b"\x91" * DEEP + b"\x90",
    "a deep time": SMALL + b"\x93" + b"\x91" * 500 + b"\x90" + b"\x00\xc4\x00",
    "a record that does not end": SMALL + many(b"\xdc", 4096, many(b"\xdc", 1024, b"\xcb" + bytes(8))),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_little(bomb) -> None:
    started = time.process_time()
    with at_most(CONSTANT):
        assert isinstance(read(BOMBS[bomb]), TraceError)
    assert time.process_time() - started < 5


@fuzzed(100)
@given(edges(2**32 - 1), st.sampled_from([b"\xc6", b"\xdb", b"\xdd", b"\xdf"]), st.booleans())
def test_a_length_that_lies_allocates_nothing(length, code, with_header) -> None:
    data = (SMALL if with_header else b"") + code + struct.pack(">I", length)
    with at_most(CONSTANT):
        outcome(lambda: read(data), TraceError)


def test_many_records_are_not_kept() -> None:
    """Reading takes the memory of one piece, however long the file is."""
    header = TraceHeader(model="m", num_experts=(60_000,), top_k=1, content="rows")
    record = encode_rows(1.0, 0, np.ones(60_000, np.int64))

    def feed_all() -> int:
        decoder = TraceDecoder("x")
        pieces = itertools.chain([encode_header(header)], itertools.repeat(record, 200))
        return sum(1 for piece in pieces for _ in decoder.feed(piece))

    with at_most(8 * 2**20):
        assert feed_all() == 200
