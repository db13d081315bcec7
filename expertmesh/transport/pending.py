"""The requests of one link that wait for their answers: each gets one, whatever happens to the link."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expertmesh._proto import host_pb2 as pb
from expertmesh.errors import ProtocolError, ReplicaFailedError, ReplicaUnavailableError
from expertmesh.transport import Answer, codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from expertmesh.ids import HostId
    from expertmesh.transport import LayerReply, LayerRequest


class Pending:
    """Turns a host's replies into answers, checked against what was asked."""

    def __init__(self, host: HostId, deliver: Callable[[Answer], None]) -> None:
        self._host = host
        self._deliver = deliver
        self._requests: dict[int, LayerRequest] = {}
        self.broken: str | None = None
        """Why nothing more will be answered."""

    def add(self, ticket: int, request: LayerRequest) -> bool:
        """Whether the request may be sent; on a broken link it is answered at once."""
        if self.broken is not None:
            self._deliver(Answer(ticket, ReplicaUnavailableError(self._host, self.broken)))
            return False
        self._requests[ticket] = request
        return True

    def reply(self, message: pb.ExchangeReply, rows: codec.Buffer) -> None:
        """A host's reply came. One to a request that is not waiting is ignored."""
        request = self._requests.pop(message.id, None)
        if request is not None:
            self._deliver(Answer(message.id, self._outcome(message, rows, request)))

    def _outcome(
        self, message: pb.ExchangeReply, rows: codec.Buffer, request: LayerRequest
    ) -> LayerReply | ReplicaUnavailableError | ReplicaFailedError:
        if message.HasField("error"):
            if message.error.code == pb.Error.NOT_READY:
                return ReplicaUnavailableError(self._host, message.error.message, is_alive=True)
            return ReplicaFailedError(self._host, message.error.message)
        try:
            return codec.decode_reply(message, rows, len(request.pair_rows), request.rows.shape[1])
        except ProtocolError as error:
            return ReplicaFailedError(self._host, str(error))

    def fail(self, cause: str) -> None:
        """The link is broken: answer all who wait. The first cause stands."""
        self.broken = self.broken or cause
        requests, self._requests = self._requests, {}
        for ticket in requests:
            self._deliver(Answer(ticket, ReplicaUnavailableError(self._host, self.broken)))
