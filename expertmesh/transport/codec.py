"""Between protobuf messages and our values, both ways, checked. The only place that knows both.

A message comes from another process and may be anything: sizes are checked before a byte is allocated or read, and
whatever is wrong is a ProtocolError that names the field.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from expertmesh._proto import host_pb2 as pb
from expertmesh.checkpoint.recipe import ExpertRecipe, TensorRecipe, TensorSource
from expertmesh.checkpoint.source import is_within
from expertmesh.errors import ConfigError, ProtocolError
from expertmesh.fault import Fault, FaultKind
from expertmesh.hosts.configuration import HostConfiguration
from expertmesh.ids import MAX_EXPERTS, MAX_LAYERS
from expertmesh.kernels.activation import ACTIVATIONS, POINTWISE
from expertmesh.kernels.formats import FORMATS
from expertmesh.kernels.spec import DTYPES, Activation, ExpertSpec
from expertmesh.transport import LayerReply, LayerRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DTYPE_NUMBERS = {"float32": pb.FLOAT32, "bfloat16": pb.BFLOAT16, "float16": pb.FLOAT16}
_FROM_DTYPE = {number: name for name, number in DTYPE_NUMBERS.items()}
_TO_KIND: dict[FaultKind, pb.Fault.Kind] = {kind: getattr(pb.Fault, kind.name) for kind in FaultKind}
_FROM_KIND = {number: kind for kind, number in _TO_KIND.items()}


Buffer = bytes | memoryview | NDArray[np.uint8]

SERVICE = pb.DESCRIPTOR.services_by_name["Host"]
EXCHANGE_METHOD = f"/{SERVICE.full_name}/Exchange"

MAX_MESSAGE_BYTES = 256 * 2**20
"""Of one message, in either direction; larger ones are refused by gRPC before they are read."""


def encode_request(request_id: int, request: LayerRequest) -> bytes:
    """An ExchangeRequest."""
    message = pb.ExchangeRequest(
        id=request_id,
        layer=request.layer,
        dtype=DTYPE_NUMBERS[request.dtype],
        num_rows=len(request.rows),
        experts=request.experts,
        counts=request.counts,
        pair_rows=request.pair_rows.astype(np.int32, copy=False).tobytes(),
    )
    return _with_rows(_REQUEST_ROWS, request.rows, message.SerializeToString())


def parse_request(data: bytes) -> tuple[pb.ExchangeRequest, Buffer]:
    """A message, and its rows: they are not copied if they come first. Raises DecodeError."""
    rows, rest = _rows_first(_REQUEST_ROWS, data)
    message = pb.ExchangeRequest.FromString(rest)
    return message, message.rows or rows


# The fields of a message may come in any order. With its rows first, the rest can be parsed without touching them.
_REQUEST_ROWS, _REPLY_ROWS = (
    bytes([of.DESCRIPTOR.fields_by_name["rows"].number << 3 | 2]) for of in (pb.ExchangeRequest, pb.ExchangeReply)
)


def _with_rows(tag: bytes, rows: NDArray[np.uint8], rest: bytes) -> bytes:
    head, length = bytearray(tag), rows.nbytes
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return b"".join((head, rows.reshape(-1).data, rest))


def _rows_first(tag: bytes, data: bytes) -> tuple[memoryview, bytes]:
    """The rows and the rest of a message that begins with them; else no rows and the message."""
    if not data.startswith(tag):
        return _NOTHING, data
    length = shift = 0
    for at in range(1, min(6, len(data))):
        length |= (data[at] & 0x7F) << shift
        shift += 7
        if data[at] < 0x80:
            end = at + 1 + length
            if end <= len(data):
                return memoryview(data)[at + 1 : end], data[end:]
            break
    return _NOTHING, data


_NOTHING = memoryview(b"")


class RequestHeader(Protocol):
    """All of a request but its id and its rows, as `pb.ExchangeRequest` has it."""

    @property
    def layer(self) -> int: ...
    @property
    def dtype(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def experts(self) -> Sequence[int]: ...
    @property
    def counts(self) -> Sequence[int]: ...
    @property
    def pair_rows(self) -> bytes | memoryview: ...


_UINT32 = np.dtype("<u4")


class RequestDecoder:
    """Checks routers' messages against what a host is configured for. Made once, used for every message."""

    def __init__(self, configuration: HostConfiguration) -> None:
        self._layers = [
            _LayerShape(DTYPE_NUMBERS[spec.dtype], spec.dtype, spec.hidden * spec.itemsize, num_experts)
            for spec, num_experts in zip(
                (configuration.spec(layer) for layer in range(configuration.num_layers)),
                configuration.layer_experts,
                strict=True,
            )
        ]

    def decode(self, message: RequestHeader, row_data: Buffer) -> LayerRequest:
        """The request that a message and its rows are. Raises ProtocolError. `pair_rows` and `row_data` may change at
        any time: of the first a copy is checked, and of the other no content matters."""
        layer, num_rows = message.layer, message.num_rows
        if layer >= len(self._layers):
            raise ProtocolError(f"layer {layer}: the model has {len(self._layers)} MoE layers")
        number, dtype, row_bytes, num_experts = self._layers[layer]
        if message.dtype != number:
            given = next((name for name, of in DTYPE_NUMBERS.items() if of == message.dtype), message.dtype)
            raise ProtocolError(f"dtype {given}: the experts of layer {layer} take {dtype}")
        if num_rows == 0 or len(row_data) != num_rows * row_bytes:
            raise ProtocolError(
                f"rows has {len(row_data)} bytes: {num_rows} rows of {row_bytes} bytes ({dtype}) "
                f"take {num_rows * row_bytes}, and there must be one at least"
            )
        experts, counts = list(message.experts), list(message.counts)
        if not experts or len(experts) != len(counts) or not all(counts):
            raise ProtocolError(f"{len(experts)} experts with {len(counts)} counts: there must be one above 0 for each")
        if max(experts) >= num_experts or len(set(experts)) != len(experts):
            raise ProtocolError(f"experts: each must be below {num_experts} and named once")
        num_pairs = sum(counts)
        if num_pairs * row_bytes > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"{num_pairs} pairs: their answer would exceed {MAX_MESSAGE_BYTES:,} bytes")
        pair_data = message.pair_rows
        if len(pair_data) != 4 * num_pairs:
            raise ProtocolError(f"pair_rows has {len(pair_data)} bytes: {num_pairs} pairs take {4 * num_pairs}")
        pair_rows = np.frombuffer(pair_data, _UINT32).astype(np.int64)  # a negative index reads as a huge one
        if np.maximum.reduce(pair_rows) >= num_rows:  # what `max` ends in
            raise ProtocolError(f"pair_rows: each must be in 0 to {num_rows - 1}")
        rows = np.frombuffer(row_data, dtype=np.uint8).reshape(num_rows, row_bytes)
        return LayerRequest(layer, dtype, rows, pair_rows, experts, counts)


class _LayerShape(NamedTuple):
    """What rows of a layer must look like."""

    dtype_number: pb.DType
    dtype: str
    row_bytes: int
    num_experts: int


def encode_reply(request_id: int, reply: LayerReply) -> bytes:
    """An ExchangeReply with rows."""
    rest = pb.ExchangeReply(id=request_id, compute_s=reply.compute_s).SerializeToString()
    return _with_rows(_REPLY_ROWS, reply.rows, rest)


def encode_refusal(request_id: int, code: pb.Error.Code, message: str) -> bytes:
    """An ExchangeReply that says why there are no rows."""
    return pb.ExchangeReply(id=request_id, error=pb.Error(code=code, message=message)).SerializeToString()


def parse_reply(data: bytes) -> tuple[pb.ExchangeReply, Buffer]:
    """A message and its rows, as `parse_request`. Raises DecodeError."""
    rows, rest = _rows_first(_REPLY_ROWS, data)
    message = pb.ExchangeReply.FromString(rest)
    return message, message.rows or rows


def decode_reply(compute_s: float, row_data: Buffer, num_pairs: int, row_bytes: int) -> LayerReply:
    """Check a host's answer against what it was asked. Raises ProtocolError."""
    if len(row_data) != num_pairs * row_bytes:
        raise ProtocolError(f"answered {len(row_data)} bytes: {num_pairs} pairs take {num_pairs * row_bytes}")
    if not 0 <= compute_s < math.inf:
        raise ProtocolError(f"answered that it took {compute_s} seconds")
    return LayerReply(np.frombuffer(row_data, dtype=np.uint8).reshape(num_pairs, row_bytes), compute_s)


def encode_spec(spec: ExpertSpec) -> pb.ExpertSpec:
    return pb.ExpertSpec(
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        gated=spec.gated,
        bias=spec.bias,
        activation=spec.activation.name,
        limit=spec.activation.limit,
        alpha=spec.activation.alpha,
        dtype=DTYPE_NUMBERS[spec.dtype],
        weight_format=spec.weight_format,
        portable=spec.portable,
    )


def decode_spec(message: pb.ExpertSpec) -> ExpertSpec:
    if message.hidden == 0 or message.intermediate == 0 or message.dtype not in _FROM_DTYPE:
        raise ProtocolError(f"spec: hidden and intermediate must be above 0, and dtype one of {', '.join(DTYPES)}")
    if message.activation not in (ACTIVATIONS if message.gated else POINTWISE):
        kind = "gated" if message.gated else "ungated"
        raise ProtocolError(f"spec: there is no activation {message.activation[:40]!r} for {kind} experts here")
    if (weight_format := message.weight_format or "dense") not in FORMATS:
        raise ProtocolError(f"spec: there is no weight format {weight_format[:40]!r} here")
    return ExpertSpec(
        hidden=message.hidden,
        intermediate=message.intermediate,
        gated=message.gated,
        bias=message.bias,
        activation=Activation(name=message.activation, limit=message.limit, alpha=message.alpha),
        dtype=_FROM_DTYPE[message.dtype],
        weight_format=weight_format,
        portable=message.portable,
    )


def encode_configuration(configuration: HostConfiguration) -> pb.ConfigureRequest:
    return pb.ConfigureRequest(
        checkpoint=configuration.checkpoint,
        specs=[encode_spec(spec) for spec in configuration.specs],
        layer_specs=configuration.layer_specs,
        layer_experts=configuration.layer_experts,
    )


def decode_configuration(message: pb.ConfigureRequest) -> HostConfiguration:
    if len(message.layer_specs) != len(message.layer_experts) or not message.layer_specs:
        raise ProtocolError("layer_specs and layer_experts: one entry for each MoE layer, and one layer at least")
    fewest, most = min(message.layer_experts), max(message.layer_experts)
    if len(message.layer_experts) > MAX_LAYERS or fewest == 0 or most > MAX_EXPERTS:
        raise ProtocolError(f"layer_experts: at most {MAX_LAYERS} layers, of 1 to {MAX_EXPERTS} experts each")
    if set(message.layer_specs) != set(range(len(message.specs))):
        raise ProtocolError(f"layer_specs: each must be below {len(message.specs)}, the number of specs, and all used")
    return HostConfiguration(
        checkpoint=message.checkpoint,
        specs=tuple(decode_spec(spec) for spec in message.specs),
        layer_specs=tuple(message.layer_specs),
        layer_experts=tuple(message.layer_experts),
    )


def encode_recipe(layer: int, index: int, recipe: ExpertRecipe) -> pb.LoadRequest:
    return pb.LoadRequest(
        layer=layer,
        index=index,
        w_in=_encode_tensor(recipe.w_in),
        w_out=_encode_tensor(recipe.w_out),
        b_in=_encode_tensor(recipe.b_in) if recipe.b_in else None,
        b_out=_encode_tensor(recipe.b_out) if recipe.b_out else None,
    )


def decode_recipe(message: pb.LoadRequest) -> ExpertRecipe:
    return ExpertRecipe(
        w_in=_decode_tensor(message.w_in),
        w_out=_decode_tensor(message.w_out),
        b_in=_decode_tensor(message.b_in) if message.HasField("b_in") else None,
        b_out=_decode_tensor(message.b_out) if message.HasField("b_out") else None,
    )


def encode_faults(faults: Iterable[Fault], seed: int) -> pb.InjectRequest:
    return pb.InjectRequest(
        faults=[
            pb.Fault(kind=_TO_KIND[fault.kind], share=fault.share, factor=fault.factor, seconds=fault.seconds)
            for fault in faults
        ],
        seed=seed,
    )


def decode_faults(message: pb.InjectRequest) -> list[Fault]:
    """The faults of an order. Raises ProtocolError."""
    try:
        return [
            Fault(
                kind=_FROM_KIND[fault.kind],
                share=fault.share,
                factor=fault.factor,
                seconds=fault.seconds,
            )
            for fault in message.faults
        ]
    except KeyError as error:
        raise ProtocolError(f"faults: there is no kind {error}") from error
    except ConfigError as error:
        raise ProtocolError(f"faults: {error}") from error


def encode_fired(fired: Mapping[FaultKind, int]) -> pb.InjectReply:
    return pb.InjectReply(fired=[pb.Fired(kind=_TO_KIND[kind], times=times) for kind, times in fired.items()])


def decode_fired(message: pb.InjectReply) -> dict[str, int]:
    """Per kind that ever fired, how often."""
    return {_FROM_KIND[of.kind].value: of.times for of in message.fired}


def _encode_tensor(recipe: TensorRecipe) -> pb.TensorRecipe:
    sources = [
        pb.TensorSource(file=source.file, name=source.name, index=source.index, parts=source.parts)
        for source in recipe.sources
    ]
    return pb.TensorRecipe(sources=sources, transpose=recipe.transpose, deinterleave=recipe.deinterleave)


def _decode_tensor(message: pb.TensorRecipe) -> TensorRecipe:
    sources = tuple(
        TensorSource(
            file=source.file,
            name=source.name,
            index=source.index if source.HasField("index") else None,
            parts=source.parts if source.HasField("parts") else None,
        )
        for source in message.sources
    )
    if not sources or not all(is_within(source.file) for source in sources):
        raise ProtocolError("recipe: every tensor needs a source, in a file inside the checkpoint folder")
    if any(source.parts == 0 for source in sources):
        raise ProtocolError("recipe: a tensor has no parts")
    return TensorRecipe(sources=sources, transpose=message.transpose, deinterleave=message.deinterleave)
