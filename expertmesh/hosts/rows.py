"""Answers routers' messages: checks one, has its rows computed, and says what came of it. Knows no connection."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from expertmesh._proto import host_pb2 as pb
from expertmesh.errors import NotHeldError, ProtocolError
from expertmesh.hosts.batcher import Batcher
from expertmesh.transport import codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from expertmesh.hosts.configuration import HostConfiguration
    from expertmesh.hosts.faults import Faults
    from expertmesh.hosts.host import Host
    from expertmesh.transport import LayerReply

    Respond = Callable[[pb.ExchangeReply | None, NDArray[np.uint8]], None]
    """Sends a reply and its rows. None: there will be none, for a fault that was asked for has hit it."""

logger = logging.getLogger(__name__)

NO_ROWS = np.empty(0, np.uint8)


class RowService:
    """The exchange's side of a host, on the host's event loop. Whatever a message holds, it gets one reply, unless a
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

    def submit(self, message: pb.ExchangeRequest, rows: codec.Buffer, respond: Respond) -> None:
        """Answer `message`, whose rows are `rows`, soon or at once."""
        if self._faults is not None:
            if (meddled := self._faults.meddle(respond)) is None:
                respond(None, NO_ROWS)
                return
            respond = meddled
        request_id = message.id

        def done(outcome: LayerReply | Exception) -> None:
            if isinstance(outcome, Exception):
                logger.error("a launch failed", exc_info=outcome)
                respond(error_reply(request_id, pb.Error.FAILED, f"{type(outcome).__name__}: {outcome}"), NO_ROWS)
            else:
                respond(codec.encode_reply(request_id, outcome), outcome.rows)

        try:
            if (decoder := self._decoder_now()) is None:
                respond(error_reply(request_id, pb.Error.NOT_READY, "the host is not configured yet"), NO_ROWS)
                return
            self._batcher.submit(self._host.prepare(decoder.decode(message, rows)), done)
        except ProtocolError as error:
            respond(error_reply(request_id, pb.Error.INVALID, str(error)), NO_ROWS)
        except NotHeldError as error:
            respond(error_reply(request_id, pb.Error.NOT_READY, str(error)), NO_ROWS)

    def _decoder_now(self) -> codec.RequestDecoder | None:
        """The decoder for what the host is configured for at the moment."""
        if self._host.configuration is not self._configuration:
            self._configuration = self._host.configuration
            self._decoder = codec.RequestDecoder(self._configuration) if self._configuration else None
        return self._decoder


def error_reply(request_id: int, code: pb.Error.Code, message: str) -> pb.ExchangeReply:
    """A reply that says why there are no rows."""
    return pb.ExchangeReply(id=request_id, error=pb.Error(code=code, message=message))
