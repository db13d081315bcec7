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
    """Turns a host's replies into answers, checked against what was asked. A reply to a request that is not waiting is
    ignored."""

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

    def reply(self, ticket: int, rows: codec.Buffer, compute_s: float) -> None:
        """The host answered with rows."""
        if (request := self._requests.pop(ticket, None)) is None:
            return
        outcome: LayerReply | ReplicaFailedError
        try:
            outcome = codec.decode_reply(compute_s, rows, len(request.pair_rows), request.rows.shape[1])
        except ProtocolError as error:
            outcome = ReplicaFailedError(self._host, str(error))
        self._deliver(Answer(ticket, outcome))

    def refuse(self, ticket: int, code: int, cause: str) -> None:
        """The host answered with an error, of one of the codes of `pb.Error`."""
        if self._requests.pop(ticket, None) is None:
            return
        if code == pb.Error.NOT_READY:
            self._deliver(Answer(ticket, ReplicaUnavailableError(self._host, cause, is_alive=True)))
        else:
            self._deliver(Answer(ticket, ReplicaFailedError(self._host, cause)))

    def fail(self, cause: str) -> None:
        """The link is broken: answer all who wait. The first cause stands."""
        self.broken = self.broken or cause
        requests, self._requests = self._requests, {}
        for ticket in requests:
            self._deliver(Answer(ticket, ReplicaUnavailableError(self._host, self.broken)))
