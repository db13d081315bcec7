"""Whatever a message between routers and hosts holds, it is right or refused, and allocates what its bytes say."""

from __future__ import annotations

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from expertmesh._proto import host_pb2 as pb
from expertmesh.errors import ProtocolError
from expertmesh.ids import MAX_EXPERTS, MAX_LAYERS, HostId
from expertmesh.transport import Answer, LayerReply, codec
from expertmesh.transport.pending import Pending
from tests.fuzz.fuzzing import at_most, damaged, edges, fuzzed, outcome, texts
from tests.fuzz.messages import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    MIXTURE,
    UINT64,
    configurations,
    good,
    recipes,
    requests,
    specs,
    tensors,
)

DECODER = codec.RequestDecoder(MIXTURE.configuration)
ROOM = 2**16
"""Bytes that anything may take, whatever the message."""


def assert_consistent(message: pb.ExchangeRequest, rows: bytes) -> None:
    """Decode, within memory of the order of the message; what passes can be computed without another check."""
    with at_most(ROOM + 40 * message.ByteSize()):
        request = outcome(lambda: DECODER.decode(message, rows), ProtocolError)
    if isinstance(request, ProtocolError):
        return
    assert request.layer < LAYERS
    assert request.rows.shape[1] == HIDDEN * 4
    assert len(request.rows) > 0
    assert len(request.experts) == len(set(request.experts)) == len(request.counts) > 0
    assert all(0 <= expert < EXPERTS for expert in request.experts)
    assert all(count > 0 for count in request.counts)
    assert request.pair_rows.shape == (sum(request.counts),)
    assert 0 <= request.pair_rows.min() <= request.pair_rows.max() < len(request.rows)


@fuzzed(300)
@given(requests())
def test_a_request_is_consistent_or_refused(message) -> None:
    assert_consistent(message, message.rows)


@fuzzed(400)
@given(damaged(good(1).SerializeToString()))
def test_a_damaged_request_is_consistent_or_refused(data) -> None:
    message = pb.ExchangeRequest()
    try:
        message.ParseFromString(data)
    except DecodeError:  # transports meet it before the decoder
        return
    assert_consistent(message, message.rows)


@fuzzed(300)
@given(requests(), st.binary(max_size=8))
def test_a_request_is_parsed_as_protobuf_does_whatever_the_order_of_its_fields(message, noise) -> None:
    rows, data = message.rows, message.SerializeToString()
    message.rows = b""
    rest = message.SerializeToString()
    tag = pb.ExchangeRequest(rows=rows).SerializeToString()
    for either in (data, tag + rest, rest + tag, tag + data, tag + rest + noise, tag[:-1]):
        expected = outcome(lambda either=either: pb.ExchangeRequest.FromString(either), DecodeError)
        got = outcome(lambda either=either: codec.parse_request(either), DecodeError)
        if isinstance(expected, DecodeError):
            assert isinstance(got, DecodeError)
            continue
        header, got_rows = got
        assert bytes(got_rows) == expected.rows
        header.rows = expected.rows
        assert header == expected


@fuzzed(100)
@given(st.integers(0, 300), st.integers(0, UINT64))
def test_what_is_encoded_here_is_what_protobuf_reads(num_rows, ticket) -> None:
    request = DECODER.decode(good(5), good(5).rows)
    rows = np.arange(num_rows * HIDDEN * 4, dtype=np.uint32).astype(np.uint8).reshape(num_rows, HIDDEN * 4)
    message = pb.ExchangeRequest.FromString(codec.encode_request(ticket, request._replace(rows=rows)))
    assert (message.id, message.num_rows, message.rows) == (ticket, num_rows, rows.tobytes())
    assert (message.experts, message.counts, message.pair_rows) == (good(5).experts, good(5).counts, good(5).pair_rows)
    reply = pb.ExchangeReply.FromString(codec.encode_reply(ticket, LayerReply(rows, 0.5)))
    assert (reply.id, reply.rows, reply.compute_s, reply.HasField("error")) == (ticket, rows.tobytes(), 0.5, False)


@fuzzed(300)
@given(
    st.builds(
        pb.ExchangeReply,
        id=st.integers(0, UINT64),
        rows=st.binary(max_size=8) | st.just(bytes(3 * HIDDEN * 4)),
        error=st.none() | st.builds(pb.Error, code=st.sampled_from([0, 1, 2, 3, 9, -1]), message=texts),
        compute_s=st.floats(width=32),
    ),
    st.booleans(),
)
def test_a_reply_answers_its_request_or_fails_it_or_is_ignored(message, is_waiting) -> None:
    answers: list[Answer] = []
    pending = Pending(HostId("h"), answers.append)
    request = DECODER.decode(good(5), good(5).rows)
    if is_waiting:
        message.id = 5
    pending.add(5, request)
    with at_most(ROOM):
        if message.HasField("error"):
            pending.refuse(message.id, message.error.code, message.error.message)
        else:
            pending.reply(message.id, message.rows, message.compute_s)
    if message.id != 5:
        assert answers == []
        return
    ((ticket, reply),) = answers
    assert ticket == 5
    if isinstance(reply, LayerReply):
        assert reply.rows.shape == (3, HIDDEN * 4)
        assert 0 <= reply.compute_s < np.inf


@fuzzed(200)
@given(configurations)
def test_a_configuration_is_of_a_model_that_can_be_or_refused(message) -> None:
    with at_most(ROOM + 200 * message.ByteSize()):
        configuration = outcome(lambda: codec.decode_configuration(message), ProtocolError)
    if isinstance(configuration, ProtocolError):
        return
    assert 0 < configuration.num_layers <= MAX_LAYERS
    assert all(0 < number <= MAX_EXPERTS for number in configuration.layer_experts)
    for layer in range(configuration.num_layers):
        assert configuration.spec(layer).hidden > 0
    again = codec.decode_configuration(codec.encode_configuration(configuration))
    assert repr(again) == repr(configuration)  # by their text, as NaN is not itself


@fuzzed(100)
@given(specs, tensors, recipes, edges(9))
def test_specs_and_recipes_are_read_or_refused(spec, tensor, recipe, layer) -> None:
    outcome(lambda: codec.decode_spec(spec), ProtocolError)
    with at_most(ROOM + 200 * recipe.ByteSize()):
        read = outcome(lambda: codec.decode_recipe(recipe), ProtocolError)
    if not isinstance(read, ProtocolError):
        files = [source.file for of in (read.w_in, read.w_out) for source in of.sources]
        assert files
        assert all(not file.startswith("/") and ".." not in file.split("/") and file.isprintable() for file in files)
