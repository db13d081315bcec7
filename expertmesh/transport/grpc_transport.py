"""The transport over gRPC: one bidirectional stream per host, held open, many requests in flight on it."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import grpc

from expertmesh._proto import host_pb2 as pb
from expertmesh._proto.host_pb2_grpc import HostStub
from expertmesh.errors import ProtocolError, ReplicaFailedError, ReplicaUnavailableError
from expertmesh.transport import codec
from expertmesh.transport.codec import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from expertmesh.ids import HostId
    from expertmesh.placement import HostInfo
    from expertmesh.transport import LayerReply, LayerRequest

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A machine that vanishes breaks no connection: ask it now and then, and notice within seconds.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Two channels to one address must not share a connection: each stream breaks alone.
    ("grpc.use_local_subchannel_pool", 1),
)

SERVER_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.so_reuseport", 0),
    # Allow the pings that clients send by CHANNEL_OPTIONS.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
)


def credentials(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that every call to a host carries."""
    return (("authorization", f"Bearer {token}"),)


class GrpcTransport:
    """Streams to hosts, opened when first needed and again after a break. See `transport.Transport`."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._streams: dict[HostId, _Stream] = {}

    async def call(self, host: HostInfo, request: LayerRequest) -> LayerReply:
        stream = self._streams.get(host.id)
        if stream is None or stream.broken is not None:
            stream = self._streams[host.id] = _Stream(host, self._token)
        return await stream.call(request)

    async def close(self) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            await stream.close()


class _Stream:
    """One open stream. Answers are matched to requests by id; once broken, it stays so."""

    def __init__(self, host: HostInfo, token: str) -> None:
        self._host = host
        self._channel = grpc.aio.insecure_channel(host.address, options=CHANNEL_OPTIONS)
        self._call = HostStub(self._channel).Exchange(metadata=credentials(token))
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[pb.ExchangeReply]] = {}
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._reader = asyncio.create_task(self._read(), name=f"read {host.id}")
        self.broken: str | None = None

    async def call(self, request: LayerRequest) -> LayerReply:
        request_id = next(self._ids)
        answer = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = answer
        try:
            async with self._writing:
                await self._call.write(codec.encode_request(request_id, request))
            reply = await answer
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self.broken = self.broken or _cause(error)  # the reader may not have been told yet
            raise ReplicaUnavailableError(self._host.id, self.broken) from error
        finally:
            self._waiting.pop(request_id, None)
        if reply.HasField("error"):
            if reply.error.code == pb.Error.NOT_READY:
                raise ReplicaUnavailableError(self._host.id, reply.error.message)
            raise ReplicaFailedError(self._host.id, reply.error.message)
        try:
            return codec.decode_reply(reply, len(request.pair_rows), request.rows.shape[1])
        except ProtocolError as error:
            raise ReplicaFailedError(self._host.id, str(error)) from error

    async def _read(self) -> None:
        """Hand each answer to who waits for it; when the stream ends, however it does, fail them all."""
        cause = "the host ended the stream"
        try:
            while (reply := await self._call.read()) is not grpc.aio.EOF:
                answer = self._waiting.get(reply.id)
                if answer is not None and not answer.done():  # else nobody waits any more: a late answer
                    answer.set_result(reply)
            if (code := await self._call.code()) is not grpc.StatusCode.OK:
                cause = f"{code.name}: {await self._call.details()}"
        except grpc.aio.AioRpcError as error:
            cause = _cause(error)
        finally:
            self.broken = cause
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(ReplicaUnavailableError(self._host.id, cause))
            await self._channel.close()

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


def _cause(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
