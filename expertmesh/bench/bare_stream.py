"""The baseline of the exchange bench: a held-open gRPC stream that echoes bytes, with nothing around it."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import grpc
import uvloop

from expertmesh.transport.grpc_link import CHANNEL_OPTIONS, SERVER_OPTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

_METHOD = "/bare/Echo"


async def _echo(messages: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    async for message in messages:
        yield message


async def serve() -> None:
    """Print the port, echo until standard input ends."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    service, _, method = _METHOD.removeprefix("/").partition("/")
    handlers: dict[str, Any] = {method: grpc.stream_stream_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    sys.stdout.write(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}\n")
    sys.stdout.flush()
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


class BareStreams:
    """One open stream to each address. The caller's thread drives the event loop, as it does for the exchange."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._loop = uvloop.new_event_loop()
        self._channels, self._calls = self._loop.run_until_complete(self._open(addresses))

    @staticmethod
    async def _open(addresses: Sequence[str]) -> tuple[list[Any], list[Any]]:
        channels = [grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for address in addresses]
        return channels, [channel.stream_stream(_METHOD)() for channel in channels]

    def echo(self, message: bytes) -> list[bytes]:
        """Send to all, wait for all."""
        return self._loop.run_until_complete(self._echo_all(message))

    async def _echo_all(self, message: bytes) -> list[bytes]:
        return await asyncio.gather(*(self._echo_one(call, message) for call in self._calls))

    @staticmethod
    async def _echo_one(call: Any, message: bytes) -> bytes:
        await call.write(message)
        reply: bytes = await call.read()
        return reply

    def close(self) -> None:
        self._loop.run_until_complete(self._close_all())
        self._loop.close()

    async def _close_all(self) -> None:
        for channel in self._channels:
            await channel.close()


if __name__ == "__main__":
    uvloop.run(serve())
