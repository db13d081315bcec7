"""Reading a trace gives back what was written, and any bytes at all give records or a TraceError."""

from __future__ import annotations

import contextlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.errors import TraceError
from expertmesh.trace.format import TraceDecoder, TraceHeader, encode_choices, encode_header, encode_rows

num_experts = st.lists(st.sampled_from([2, 3, 255, 256, 257, 4000]), min_size=1, max_size=4)


@given(num_experts, st.integers(1, 2), st.data())
def test_choices_survive_the_file(counts, top_k, data) -> None:
    header = TraceHeader(model="m", num_experts=tuple(counts), top_k=top_k, content="choices")
    layers = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=5))
    exchanges = []
    for layer in layers:
        tokens = data.draw(st.integers(1, 5))
        flat = data.draw(st.lists(st.integers(0, counts[layer] - 1), min_size=tokens * top_k, max_size=tokens * top_k))
        exchanges.append((data.draw(st.floats(0, 1e9)), layer, np.array(flat).reshape(tokens, top_k)))
    decoder = TraceDecoder("x")
    records = list(decoder.feed(encode_header(header) + b"".join(encode_choices(header, *of) for of in exchanges)))
    assert decoder.header == header
    assert [(r.time_s, r.layer, r.index_TK.tolist()) for r in records] == [
        (time_s, layer, index_TK.tolist()) for time_s, layer, index_TK in exchanges
    ]
    for record in records:
        assert record.rows_E.tolist() == [int((record.index_TK == e).sum()) for e in range(counts[record.layer])]


@given(st.lists(st.integers(0, 2**63 - 1), min_size=3, max_size=3), st.floats(0, 1e9))
def test_rows_survive_the_file(rows, time_s) -> None:
    header = TraceHeader(model="m", num_experts=(3,), top_k=1, content="rows")
    (record,) = TraceDecoder("x").feed(encode_header(header) + encode_rows(time_s, 0, np.array(rows)))
    assert (record.time_s, record.rows_E.tolist()) == (time_s, rows)


@given(
    st.binary(max_size=200), st.booleans(), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4)
)
def test_any_bytes_are_a_trace_or_a_trace_error(noise, with_header, flips) -> None:
    header = TraceHeader(model="m", num_experts=(3,), top_k=1, content="choices")
    record = encode_choices(header, 1, 0, np.array([[0], [2]]))
    data = bytearray((encode_header(header) + record * 3 if with_header else b"") + noise)
    for position, value in flips:
        if position < len(data):
            data[position] = value
    decoder = TraceDecoder("x")
    with contextlib.suppress(TraceError):
        for read in decoder.feed(bytes(data)):
            if read.index_TK is not None:  # the flips may have made it a trace of rows
                assert 0 <= read.index_TK.min() <= read.index_TK.max() < decoder.header.num_experts[read.layer]
        decoder.finish()
