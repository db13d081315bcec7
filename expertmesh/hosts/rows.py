"""Answers routers' messages: checks one, has its rows computed, and says what came of it. Knows no connection."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from expertmesh._proto import host_pb2 as pb
from expertmesh.errors import NotHeldError, ProtocolError
from expertmesh.hosts.batcher import Batcher
from expertmesh.transport import codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.hosts.faults import Faults
    from expertmesh.hosts.host import Host
    from expertmesh.transport import LayerReply

    Respond = Callable[[LayerReply | "Refusal" | None], None]
    """Sends an answer. None: there will be none, for a fault that was asked for has hit it."""

logger = logging.getLogger(__name__)


class Refusal(NamedTuple):
    """Why there are no rows."""

    code: pb.Error.Code
    message: str


class RowService:
    """The exchange's side of a host, on the host's event loop. Whatever a message holds, it gets one answer, unless a
    fault that was asked for hits it."""

    def __init__(self, host: Host, faults: Faults | None = None) -> None:
        """`faults` stand between the host and the routers, if it was started to be broken."""
        self._host = host
        self._faults = faults
        self._batcher = Batcher(host.compute)
        self._configuration: HostConfiguration | None = None
        self._decoder: codec.RequestDecoder | None = None
        self.connections = 0
        """Routers connected now, over gRPC and local sockets."""

    def submit(self, message: codec.RequestHeader, rows: codec.Buffer, respond: Respond) -> None:
        """Answer `message`, whose rows are `rows`, soon or at once."""
        if self._faults is not None:
            if (meddled := self._faults.meddle(respond)) is None:
                respond(None)
                return
            respond = meddled

        def done(outcome: LayerReply | Exception) -> None:
            if isinstance(outcome, Exception):
                logger.error("a launch failed", exc_info=outcome)
                respond(Refusal(pb.Error.FAILED, f"{type(outcome).__name__}: {outcome}"))
            else:
                respond(outcome)

        try:
            if (decoder := self._decoder_now()) is None:
                respond(Refusal(pb.Error.NOT_READY, "the host is not configured yet"))
                return
            self._batcher.submit(self._host.prepare(decoder.decode(message, rows)), done)
        except ProtocolError as error:
            respond(Refusal(pb.Error.INVALID, str(error)))
        except NotHeldError as error:
            respond(Refusal(pb.Error.NOT_READY, str(error)))

    def _decoder_now(self) -> codec.RequestDecoder | None:
        """The decoder for what the host is configured for at the moment."""
        if self._host.configuration is not self._configuration:
            self._configuration = self._host.configuration
            self._decoder = codec.RequestDecoder(self._configuration) if self._configuration else None
        return self._decoder
