"""Between the messages of protos/host.proto's Training and our values, both ways, checked as `codec` checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from expertmesh._proto import host_pb2 as pb
from expertmesh.errors import ConfigError, ProtocolError
from expertmesh.optimizer import Optimizer
from expertmesh.transport.codec import DTYPE_NUMBERS

if TYPE_CHECKING:
    from expertmesh.transport import LayerRequest
    from expertmesh.transport.codec import RequestDecoder


def encode_optimizer(optimizer: Optimizer) -> pb.Optimizer:
    return pb.Optimizer(
        name=optimizer.name,
        momentum=optimizer.momentum,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
    )


def decode_optimizer(message: pb.Optimizer) -> Optimizer:
    """Raises ProtocolError."""
    try:
        return Optimizer(
            name=message.name,
            momentum=message.momentum,
            beta1=message.beta1,
            beta2=message.beta2,
            epsilon=message.epsilon,
            weight_decay=message.weight_decay,
        )
    except ConfigError as error:
        raise ProtocolError(str(error)) from error


def encode_backward(
    session: int, step: int, part: int, request: LayerRequest, grad_PH: torch.Tensor
) -> pb.BackwardRequest:
    """`grad_PH` is on CPU, in the request's dtype."""
    pairs = pb.ExchangeRequest(
        layer=request.layer,
        dtype=DTYPE_NUMBERS[request.dtype],
        num_rows=len(request.rows),
        rows=request.rows.tobytes(),
        experts=request.experts,
        counts=request.counts,
        pair_rows=request.pair_rows.astype(np.int32, copy=False).tobytes(),
    )
    return pb.BackwardRequest(session=session, step=step, part=part, pairs=pairs, grad_rows=to_bytes(grad_PH))


def decode_backward(decoder: RequestDecoder, message: pb.BackwardRequest) -> tuple[LayerRequest, torch.Tensor]:
    """The pairs, and grad_PH in their dtype. Raises ProtocolError."""
    request = decoder.decode(message.pairs, message.pairs.rows)
    return request, from_bytes(message.grad_rows, len(request.pair_rows), request.rows.shape[1], request.dtype)


def to_bytes(rows: torch.Tensor) -> bytes:
    return rows.contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, num_rows: int, row_bytes: int, dtype: str) -> torch.Tensor:
    """[num_rows, H] of `dtype`. Raises ProtocolError for another number of bytes."""
    if len(data) != num_rows * row_bytes:
        raise ProtocolError(f"grad_rows has {len(data)} bytes: {num_rows} pairs take {num_rows * row_bytes}")
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(num_rows, -1)
