"""A link over gRPC: one bidirectional stream, held open, with many requests under way on it.

Also how any gRPC connection to a host is made: its limits, its encryption (see `tls`), its token.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from expertmesh.tls import HOST_NAME, live_identity
from expertmesh.transport import codec
from expertmesh.transport.codec import MAX_MESSAGE_BYTES
from expertmesh.transport.pending import Pending

if TYPE_CHECKING:
    from collections.abc import Callable

    from expertmesh._proto import host_pb2 as pb
    from expertmesh.placement import HostInfo
    from expertmesh.tls import TlsFiles
    from expertmesh.transport import Answer, LayerRequest

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
    # Of one connection. A router has one stream open, a controller some orders under way.
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    # Strangers may neither crowd out routers nor stay: they have so long to prove who they are, and to call.
    ("grpc.max_allowed_incoming_connections", 1024),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.so_reuseport", 0),
    # Allow the pings that clients send by CHANNEL_OPTIONS.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
)


def credentials(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that every call to a host carries."""
    return (("authorization", f"Bearer {token}"),)


def open_channel(host: HostInfo, tls: TlsFiles | None) -> grpc.aio.Channel:
    """A connection to a host, encrypted and proven on both sides if there are `tls` files: as they are now."""
    if tls is None:
        return grpc.aio.insecure_channel(host.address, options=CHANNEL_OPTIONS)
    own = live_identity(tls).current()
    trust = grpc.ssl_channel_credentials(own.ca, own.key, own.certificate)
    # gRPC means by the backoff also how long a connection may take to come about, which now includes a handshake.
    options = dict(CHANNEL_OPTIONS) | {
        "grpc.ssl_target_name_override": HOST_NAME,
        "grpc.min_reconnect_backoff_ms": 2_000,
    }
    return grpc.aio.secure_channel(host.address, trust, options=tuple(options.items()))


class GrpcLink:
    """One open stream. See `network.Link`."""

    def __init__(
        self, host: HostInfo, token: str, deliver: Callable[[Answer], None], tls: TlsFiles | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._pending = Pending(host.id, deliver)
        self._channel = open_channel(host, tls)
        exchange: grpc.aio.StreamStreamMultiCallable[bytes, tuple[pb.ExchangeReply, codec.Buffer]]
        exchange = self._channel.stream_stream(codec.EXCHANGE_METHOD, response_deserializer=codec.parse_reply)
        self._call = exchange(metadata=credentials(token))
        self._is_let_in = False
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._writers: set[asyncio.Task[None]] = set()
        self._reader = self._loop.create_task(self._read(), name=f"read {host.id}")

    @staticmethod
    async def connect(
        host: HostInfo, token: str, deliver: Callable[[Answer], None], tls: TlsFiles | None = None
    ) -> GrpcLink:
        """Begin to connect; whether that succeeds is seen by the answers."""
        return GrpcLink(host, token, deliver, tls)

    @property
    def broken(self) -> str | None:
        return self._pending.broken

    @property
    def is_over(self) -> bool:
        """Whether it has nothing left to do."""
        return self._reader.done()

    def send(self, ticket: int, request: LayerRequest) -> None:
        if self._pending.add(ticket, request):
            writer = self._loop.create_task(self._write(codec.encode_request(ticket, request)))
            self._writers.add(writer)
            writer.add_done_callback(self._writers.discard)

    async def _write(self, message: bytes) -> None:
        try:
            async with self._writing:
                if not self._is_let_in:
                    await self._call.initial_metadata()  # now it has let us in, or has refused and ended the stream
                    self._is_let_in = True
                await self._call.write(message)
        except asyncio.InvalidStateError:
            pass  # the stream has ended: the reader comes to know why, and fails all who wait
        except grpc.aio.AioRpcError as error:
            self._pending.fail(_cause(error))  # the reader may not have been told yet

    async def _read(self) -> None:
        """Pass on each reply; when the stream ends, however it does, fail all who wait."""
        cause = "the host ended the stream"
        try:
            while isinstance(reply := await self._call.read(), tuple):
                message, rows = reply
                if message.HasField("error"):
                    self._pending.refuse(message.id, message.error.code, message.error.message)
                else:
                    self._pending.reply(message.id, rows, message.compute_s)
            if (code := await self._call.code()) is not grpc.StatusCode.OK:
                cause = f"{code.name}: {await self._call.details()}"
        except grpc.aio.AioRpcError as error:
            cause = _cause(error)
        finally:
            self._pending.fail(cause)
            await self._channel.close()

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, *self._writers, return_exceptions=True)


def _cause(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
