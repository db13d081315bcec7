"""From an error to what the client is told: the one place that knows HTTP statuses and OpenAI's error body."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from expertmesh.errors import (
    BusyError,
    ConfigError,
    DeadlineExceededError,
    ExpertMeshError,
    InvalidRequestError,
    NoControllerError,
    NoReadyReplicaError,
    NoRouterError,
    NotFiniteError,
    OverloadedError,
    RouterGoneError,
    one_line,
)

_TYPES = {429: "rate_limit_error", 504: "timeout_error"}
_RETRY_NO_REPLICA_S = 1.0
"""A replica is loaded, or a host replaced, in about this time."""
_RETRY_ROUTER_GONE_S = 1.0
"""Another takes its place at once, if there is any."""
_RETRY_NO_CONTROLLER_S = 5.0


class ClientDisconnectedError(Exception):
    """The client's: it hung up, so its request was cancelled and nobody reads the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What went wrong, as a client sees it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    is_defect: bool = False
    """Nobody foresaw it: its trace belongs in the log, and nothing of it in the body."""

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(json.dumps(self.body()), self.status, headers, "application/json")


def problem_of(error: Exception) -> Problem:
    match error:
        case InvalidRequestError():
            return Problem(status=error.status, message=str(error), param=error.param, code=error.code)
        case OverloadedError():
            return Problem(status=429, message=str(error), code="overloaded", retry_after_s=error.retry_after_s)
        case NoReadyReplicaError():
            return Problem(status=503, message=str(error), code="no_ready_replica", retry_after_s=_RETRY_NO_REPLICA_S)
        case NoRouterError():
            return Problem(status=503, message=str(error), code="no_router", retry_after_s=error.retry_after_s)
        case RouterGoneError():
            return Problem(status=503, message=str(error), code="router_gone", retry_after_s=_RETRY_ROUTER_GONE_S)
        case NotFiniteError():
            return Problem(status=500, message=str(error), code="not_finite")
        case NoControllerError():
            return Problem(status=503, message=str(error), code="no_controller", retry_after_s=_RETRY_NO_CONTROLLER_S)
        case BusyError():
            return Problem(status=409, message=str(error), code="busy")
        case ConfigError():
            return Problem(status=400, message=str(error))
        case DeadlineExceededError():
            return Problem(status=504, message=str(error), code="deadline_exceeded")
        case RequestValidationError():
            return _problem_of_validation(error.errors())
        case HTTPException():
            return Problem(status=error.status_code, message=str(error.detail))
        case ClientDisconnectedError():
            return Problem(status=499, message="the client closed the connection")
        case ExpertMeshError():
            return Problem(status=500, message=str(error))
        case _:
            return Problem(status=500, message="internal error; the server's log has its cause", is_defect=True)


def _problem_of_validation(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """The first of pydantic's complaints."""
    first = errors[0]
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return Problem(status=400, message=f"the body is not valid JSON: {reason} at character {place[0]}")
    if not place:
        return Problem(status=400, message="send a JSON object as the body")
    place = [part if isinstance(part, int) else one_line(str(part)) for part in place]
    param = str(place[0]) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place[1:])
    return Problem(status=400, message=f"{param}: {first['msg']}", param=param)
