"""The trace file: what is written is read, and what is no trace is refused in one line."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgpack
import numpy as np
import pytest

from expertmesh.errors import TraceError
from expertmesh.trace.format import (
    MAX_RECORD_BYTES,
    TraceDecoder,
    TraceHeader,
    TraceReader,
    encode_choices,
    encode_gap,
    encode_header,
    encode_rows,
    fingerprint,
)

HEADER = TraceHeader(model="m", fingerprint="f", num_experts=(4, 300), top_k=2, content="choices", origin={"by": "me"})
ROWS_HEADER = TraceHeader(model="m", num_experts=(4, 300), top_k=2, content="rows")
INDEX_TK = np.array([[0, 3], [1, 2], [3, 0]])
WIDE_TK = np.array([[299, 0]])


def written(tmp_path: Path, *pieces: bytes) -> Path:
    path = tmp_path / "x.trace"
    path.write_bytes(b"".join(pieces))
    return path


def test_exchanges_come_back_as_they_were(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        encode_header(HEADER),
        encode_choices(HEADER, 0.25, 0, INDEX_TK),
        encode_choices(HEADER, 1, 1, WIDE_TK),
    )
    reader = TraceReader(path)
    assert reader.header == HEADER
    first, second = reader
    assert (first.time_s, first.layer, second.time_s, second.layer) == (0.25, 0, 1.0, 1)
    np.testing.assert_array_equal(first.index_TK, INDEX_TK)
    np.testing.assert_array_equal(first.rows_E, [2, 1, 1, 2])
    np.testing.assert_array_equal(second.index_TK, WIDE_TK)
    assert [r.time_s for r in reader] == [0.25, 1.0]  # a reader can be read again


def test_one_byte_says_which_of_few_experts_a_token_chose() -> None:
    assert len(encode_choices(HEADER, 0, 0, INDEX_TK)) == INDEX_TK.size + 13


@pytest.mark.parametrize("most", [0, 255, 256, 65_535, 65_536, 2**32, 2**62])
def test_rows_of_every_size_come_back(tmp_path: Path, most: int) -> None:
    rows_E = np.array([most, 0, 1, most // 3])
    (record,) = TraceReader(written(tmp_path, encode_header(ROWS_HEADER), encode_rows(7, 0, rows_E)))
    np.testing.assert_array_equal(record.rows_E, rows_E)
    assert record.index_TK is None


def test_a_trace_cut_anywhere_loses_only_its_last_record(tmp_path: Path) -> None:
    head = encode_header(HEADER)
    records = [encode_choices(HEADER, i, 0, INDEX_TK) for i in range(3)]
    whole = head + b"".join(records)
    for length in range(len(head), len(whole) + 1):
        reader = TraceReader(written(tmp_path, whole[:length]))
        complete, rest = divmod(length - len(head), len(records[0]))
        assert len(list(reader)) == complete
        assert reader.decoder.num_bytes_left == rest


def test_a_trace_can_be_read_while_it_is_written_and_appended_to(tmp_path: Path) -> None:
    path = written(tmp_path, encode_header(HEADER), encode_choices(HEADER, 0, 0, INDEX_TK))
    reader = TraceReader(path)
    assert len(list(reader)) == 1
    with path.open("ab") as file:
        file.write(encode_choices(HEADER, 1, 1, WIDE_TK))
    assert len(list(reader)) == 2


def test_bytes_may_come_in_any_pieces() -> None:
    data = encode_header(HEADER) + encode_choices(HEADER, 0, 0, INDEX_TK) + encode_gap(1, 9)
    decoder = TraceDecoder("x")
    records = [record for i in range(len(data)) for record in decoder.feed(data[i : i + 1])]
    assert (len(records), decoder.num_records, decoder.num_dropped, decoder.num_bytes_left) == (1, 1, 9, 0)
    assert decoder.finish() == HEADER


def header_with(**changes: object) -> bytes:
    return msgpack.packb(msgpack.unpackb(encode_header(HEADER)) | changes)


HUGE_BYTES = b"\xc6\xff\xff\xff\xff"  # announces 4 GiB of bytes
HUGE_LIST = b"\xdd\xff\xff\xff\xff"
HUGE_MAP = b"\xdf\xff\xff\xff\xff"
HUGE_TEXT = b"\xdb\xff\xff\xff\xff"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (encode_header(HEADER)[:-1], "it ends within its header"),
        (b"hello, world", "not an expertmesh trace"),
        (b"\x00" * 100, "not an expertmesh trace"),
        (msgpack.packb({"format": "other"}), "not an expertmesh trace"),
        (HUGE_MAP, "not an expertmesh trace"),
        (HUGE_TEXT, "it ends within its header"),
        (b"\x81" * 2000, "not an expertmesh trace"),
        (header_with(version=2), r"a trace of version 2; this reads version 1"),
        (header_with(time_unit="ms"), "time_unit"),
        (header_with(num_experts=[]), "num_experts"),
        (header_with(num_experts=[4, -1]), "count -1"),
        (header_with(num_experts=[4, 2**40]), "count 1099511627776"),
        (header_with(num_experts=[4, True]), "count True"),
        (header_with(top_k=0), "count 0"),
        (header_with(top_k=5), "count 5"),
        (header_with(content="tea"), "content"),
        (header_with(model=7), "model"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        TraceReader(written(tmp_path, data))
    assert "x.trace" in str(caught.value)
    assert "\n" not in str(caught.value)


def packed(*record: object) -> bytes:
    return msgpack.packb(list(record))


@pytest.mark.parametrize(
    "data",
    [
        HUGE_LIST,
        b"\xc1",  # never used by msgpack
        packed(1.0, 0),
        packed(1, 0, b"\0\0"),
        packed(-1.0, 0, b"\0\0"),
        packed(float("nan"), 0, b"\0\0"),
        packed(1.0, 2, b"\0\0"),
        packed(1.0, -1, b"\0\0"),
        packed(1.0, True, b"\0\0"),
        packed(1.0, 0, "text"),
        packed(1.0, 0, b""),
        packed(1.0, 0, b"\0"),
        packed(1.0, 0, b"\0\4"),
        packed(1.0, None, 0),
        packed(1.0, None, b""),
    ],
)
def test_a_damaged_record_is_refused_after_those_before_it(tmp_path: Path, data: bytes) -> None:
    path = written(tmp_path, encode_header(HEADER), encode_choices(HEADER, 0, 0, INDEX_TK), data)
    read = []
    with pytest.raises(TraceError, match=r"x\.trace: damaged after 1 records, at byte \d+: ."):
        read.extend(TraceReader(path))
    assert len(read) in (0, 1)


def test_a_record_that_announces_more_than_may_be_is_refused_before_it_fills_the_memory() -> None:
    decoder = TraceDecoder("x")
    pieces = itertools.chain([encode_header(HEADER) + HUGE_BYTES], itertools.repeat(bytes(MAX_RECORD_BYTES // 4), 10))
    with pytest.raises(TraceError, match="damaged"):
        any(record for piece in pieces for record in decoder.feed(piece))
    assert decoder.num_bytes_left < 3 * MAX_RECORD_BYTES


@pytest.mark.parametrize("data", [b"", b"\0" * 3, b"\0" * 12, b"\xff" * 32])
def test_rows_of_the_wrong_width_or_absurdly_many_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(TraceError, match="damaged"):
        list(TraceReader(written(tmp_path, encode_header(ROWS_HEADER), packed(1.0, 0, data))))


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        TraceReader(tmp_path / "none.trace")


def test_a_checkpoint_is_named_by_its_config() -> None:
    assert fingerprint(b"{}") == fingerprint(b"{}") != fingerprint(b"{ }")
    assert len(fingerprint(b"{}")) == 16


def test_a_trace_of_another_model_does_not_fit() -> None:
    HEADER.check_fits(num_experts=[4, 300], fingerprint="f", of="the mesh")
    HEADER.check_fits(num_experts=[4, 300], fingerprint="", of="the mesh")
    ROWS_HEADER.check_fits(num_experts=[4, 300], fingerprint="g", of="the mesh")
    with pytest.raises(TraceError, match="2 layers of 4 or 300 experts, the mesh has 2 layers of 4 experts"):
        HEADER.check_fits(num_experts=[4, 4], fingerprint="f", of="the mesh")
    with pytest.raises(TraceError, match="fingerprint f, the mesh has g"):
        HEADER.check_fits(num_experts=[4, 300], fingerprint="g", of="the mesh")
