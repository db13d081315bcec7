"""Between protobuf messages and our values, both ways, checked. The only place that knows both.

A message comes from another process and may be anything: sizes are checked before a byte is allocated or read, and
whatever is wrong is a ProtocolError that names the field.
"""

from __future__ import annotations

import numpy as np

from expertmesh._proto import host_pb2 as pb
from expertmesh.checkpoint.recipe import ExpertRecipe, TensorRecipe, TensorSource
from expertmesh.errors import ProtocolError
from expertmesh.hosts.configuration import HostConfiguration
from expertmesh.kernels.spec import DTYPES, Activation, ExpertSpec
from expertmesh.transport import LayerReply, LayerRequest

_TO_DTYPE = {"float32": pb.FLOAT32, "bfloat16": pb.BFLOAT16, "float16": pb.FLOAT16}
_FROM_DTYPE = {number: name for name, number in _TO_DTYPE.items()}


MAX_MESSAGE_BYTES = 256 * 2**20
"""Of one message, in either direction; larger ones are refused by gRPC before they are read."""


def encode_request(request_id: int, request: LayerRequest) -> pb.ExchangeRequest:
    return pb.ExchangeRequest(
        id=request_id,
        layer=request.layer,
        dtype=_TO_DTYPE[request.dtype],
        num_rows=len(request.rows),
        rows=request.rows.tobytes(),
        experts=request.experts,
        counts=request.counts,
        pair_rows=request.pair_rows.tobytes(),
    )


def decode_request(message: pb.ExchangeRequest, configuration: HostConfiguration) -> LayerRequest:
    """Check a router's message against what this host is configured for."""
    if message.layer >= configuration.num_layers:
        raise ProtocolError(f"layer {message.layer}: the model has {configuration.num_layers} MoE layers")
    spec = configuration.spec(message.layer)
    dtype = _FROM_DTYPE.get(message.dtype)
    if dtype != spec.dtype:
        raise ProtocolError(f"dtype {dtype or message.dtype}: the experts of layer {message.layer} take {spec.dtype}")
    row_bytes = spec.hidden * spec.itemsize
    if message.num_rows == 0 or len(message.rows) != message.num_rows * row_bytes:
        raise ProtocolError(
            f"rows has {len(message.rows)} bytes: {message.num_rows} rows of {spec.hidden} x {dtype} "
            f"take {message.num_rows * row_bytes}, and there must be one at least"
        )
    experts, counts = list(message.experts), list(message.counts)
    if not experts or len(experts) != len(counts) or not all(counts):
        raise ProtocolError(f"{len(experts)} experts with {len(counts)} counts: there must be one above 0 for each")
    num_experts = configuration.layer_experts[message.layer]
    if max(experts) >= num_experts or len(set(experts)) != len(experts):
        raise ProtocolError(f"experts: each must be below {num_experts} and named once")
    num_pairs = sum(counts)
    if num_pairs * row_bytes > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{num_pairs} pairs: their answer would exceed {MAX_MESSAGE_BYTES:,} bytes")
    if len(message.pair_rows) != 4 * num_pairs:
        raise ProtocolError(f"pair_rows has {len(message.pair_rows)} bytes: {num_pairs} pairs take {4 * num_pairs}")
    pair_rows = np.frombuffer(message.pair_rows, dtype="<u4")  # a negative index reads as a huge one
    if pair_rows.max() >= message.num_rows:
        raise ProtocolError(f"pair_rows: each must be in 0 to {message.num_rows - 1}")
    rows = np.frombuffer(message.rows, dtype=np.uint8).reshape(message.num_rows, row_bytes)
    return LayerRequest(message.layer, dtype, rows, pair_rows.view(np.int32), experts, counts)


def encode_reply(request_id: int, reply: LayerReply) -> pb.ExchangeReply:
    return pb.ExchangeReply(id=request_id, rows=reply.rows.tobytes(), compute_s=reply.compute_s)


def decode_reply(message: pb.ExchangeReply, num_pairs: int, row_bytes: int) -> LayerReply:
    """Check a host's answer against what it was asked."""
    if len(message.rows) != num_pairs * row_bytes:
        raise ProtocolError(f"answered {len(message.rows)} bytes: {num_pairs} pairs take {num_pairs * row_bytes}")
    rows = np.frombuffer(message.rows, dtype=np.uint8).reshape(num_pairs, row_bytes)
    return LayerReply(rows, message.compute_s)


def encode_spec(spec: ExpertSpec) -> pb.ExpertSpec:
    return pb.ExpertSpec(
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        gated=spec.gated,
        bias=spec.bias,
        activation=spec.activation.name,
        limit=spec.activation.limit,
        alpha=spec.activation.alpha,
        dtype=_TO_DTYPE[spec.dtype],
    )


def decode_spec(message: pb.ExpertSpec) -> ExpertSpec:
    if message.hidden == 0 or message.intermediate == 0 or message.dtype not in _FROM_DTYPE:
        raise ProtocolError(f"spec: hidden and intermediate must be above 0, and dtype one of {', '.join(DTYPES)}")
    return ExpertSpec(
        hidden=message.hidden,
        intermediate=message.intermediate,
        gated=message.gated,
        bias=message.bias,
        activation=Activation(name=message.activation, limit=message.limit, alpha=message.alpha),
        dtype=_FROM_DTYPE[message.dtype],
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
    if max(message.layer_specs) >= len(message.specs):
        raise ProtocolError(f"layer_specs: each must be below {len(message.specs)}, the number of specs")
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


def _encode_tensor(recipe: TensorRecipe) -> pb.TensorRecipe:
    sources = [pb.TensorSource(file=source.file, name=source.name, index=source.index) for source in recipe.sources]
    return pb.TensorRecipe(sources=sources, transpose=recipe.transpose, deinterleave=recipe.deinterleave)


def _decode_tensor(message: pb.TensorRecipe) -> TensorRecipe:
    sources = tuple(
        TensorSource(file=source.file, name=source.name, index=source.index if source.HasField("index") else None)
        for source in message.sources
    )
    if not sources or any(".." in source.file or source.file.startswith("/") for source in sources):
        raise ProtocolError("recipe: every tensor needs a source, in a file inside the checkpoint folder")
    return TensorRecipe(sources=sources, transpose=message.transpose, deinterleave=message.deinterleave)
