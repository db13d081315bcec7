"""How a host's services answer orders over gRPC: our errors as status codes, and methods by the names of the protocol.

Knows no service. Invariant: what an order may raise by its interface reaches the caller as a status that says which
error it was; anything else is a defect, and ends in UNKNOWN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from expertmesh._proto import host_pb2 as pb
from expertmesh.errors import (
    CheckpointError,
    ConfigError,
    NotHeldError,
    OutOfSlotsError,
    ProtocolError,
    TrainingLostError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

_STATUS = (
    (ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (OutOfSlotsError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (CheckpointError, grpc.StatusCode.DATA_LOSS),
    (NotHeldError, grpc.StatusCode.NOT_FOUND),
    (TrainingLostError, grpc.StatusCode.ABORTED),
)


async def answered(call: Callable[[], Awaitable[T]], context: grpc.aio.ServicerContext[Any, Any]) -> T:
    """The call's result; our errors become the status that the caller reads back."""
    try:
        return await call()
    except tuple(kind for kind, _ in _STATUS) as error:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        await context.abort(status, str(error))


def handlers(name: str, service: object, **special: grpc.RpcMethodHandler[Any, Any]) -> grpc.GenericRpcHandler:
    """Those of the service with this name, as the generated code has them; but for methods with a `special` one, whose
    rows should be copied as seldom as can be."""
    described = pb.DESCRIPTOR.services_by_name[name]
    plain: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        of.name: grpc.unary_unary_rpc_method_handler(
            getattr(service, of.name),
            getattr(pb, of.input_type.name).FromString,
            getattr(pb, of.output_type.name).SerializeToString,
        )
        for of in described.methods
        if of.name not in special
    }
    return grpc.method_handlers_generic_handler(described.full_name, plain | special)
