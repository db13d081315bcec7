"""Every error that crosses one of our interfaces. Each says whose fault it is and what the caller may do.

Errors carry fields, so that a program can act on them; the message is for a person, names the field and the fix, and
is one line. Programmer errors are `assert`s and are not here.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from expertmesh.ids import ExpertId, HostId


class ExpertMeshError(Exception):
    """Base of all our errors. They keep their fields when they cross to another process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


def one_line(text: str, most: int = 300) -> str:
    """What others wrote, as a part of a message: short, on one line, with nothing that steers a terminal."""
    text = " ".join(text.split())
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"{text[:most]}..."


def _restore(kind: type[ExpertMeshError], args: tuple[Any, ...], fields: dict[str, Any]) -> ExpertMeshError:
    """Rebuild an error without its constructor, whose signature is for those who raise it."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


# --- the user's: something they wrote or chose has to change ---------------------------------------------------------


class ConfigError(ExpertMeshError):
    """The user's: a config, an argument or an environment cannot work as given. Fix it and start again."""


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise ConfigError for a name that is none of the known ones: it tells the nearest of them, and all."""
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)[0]
        given = one_line(str(name), 60)
        raise ConfigError(f"{what} {given!r} is unknown: did you mean {near}? There are {', '.join(names)}")


class CheckpointError(ExpertMeshError):
    """The user's: a checkpoint is missing, incomplete, corrupt or of an architecture that cannot be served."""


class TraceError(ExpertMeshError):
    """The user's: a trace is missing, damaged, of another version, or of another model. Use or record another one."""


class InvalidRequestError(ExpertMeshError):
    """The client's: this request can never succeed as it is. Do not retry it unchanged (HTTP 400 or 404)."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


# --- the moment's: the same call may succeed later or elsewhere ------------------------------------------------------


class OverloadedError(ExpertMeshError):
    """Nobody's: too much work is waiting. Retry after `retry_after_s` (HTTP 429)."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BusyError(ExpertMeshError):
    """The operator's: what was asked for before this is still under way. Ask again when it is done (HTTP 409)."""


class NoControllerError(ExpertMeshError):
    """The mesh's: its controller is starting or away. Requests are served without it; ask it again later (HTTP 503)."""


class RouterGoneError(ExpertMeshError):
    """The router's: it ended, or fell silent, while it had a request. What it said stands; another router can go on."""


class NoRouterError(ExpertMeshError):
    """The mesh's: no router answered in time. Retry after `retry_after_s` (HTTP 503)."""

    def __init__(self, message: str, *, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ReplicaUnavailableError(ExpertMeshError):
    """The network's, or a dead host's: the rows were not answered. Send them to another replica."""

    def __init__(self, host: HostId, cause: str, *, is_alive: bool = False) -> None:
        """`is_alive`: the host said so itself, and is well."""
        super().__init__(f"host {host} is unavailable: {cause}")
        self.host = host
        self.cause = cause
        self.is_alive = is_alive


class ReplicaFailedError(ExpertMeshError):
    """The host's: it got the rows and refused them, or failed to compute them. Send them to another one."""

    def __init__(self, host: HostId, cause: str) -> None:
        super().__init__(f"host {host} failed: {cause}")
        self.host = host
        self.cause = cause


class NoReadyReplicaError(ExpertMeshError):
    """The mesh's: nobody can serve this expert now. Retry later (HTTP 503)."""

    def __init__(self, expert: ExpertId, cause: str = "") -> None:
        super().__init__(f"no host can serve expert {expert} now" + (f" ({cause})" if cause else ""))
        self.expert = expert


class NotFiniteError(ExpertMeshError):
    """The model's: it computed NaN or infinity for this request, so there is no next token. Nothing of it was sent, and
    requests computed with it go on (HTTP 500)."""


class TrainingLostError(ExpertMeshError):
    """A host's that is gone, or was given to others: what was trained since the last checkpoint is lost with it.

    Restore that checkpoint, in the hosts and in what the trainer holds itself, and do the steps since once more.
    """


class DeadlineExceededError(ExpertMeshError):
    """Time ran out while work was pending. Do not retry within the same deadline (HTTP 504)."""

    def __init__(self, message: str, *, deadline_s: float) -> None:
        super().__init__(message)
        self.deadline_s = deadline_s


# --- between router and host -----------------------------------------------------------------------------------------


class ProtocolError(ExpertMeshError):
    """The peer's: a message breaks the protocol (shape, dtype, size, unknown expert). Nothing was computed."""


class NotHeldError(ExpertMeshError):
    """The caller's placement is old, or too new: this host holds no replica of the expert. Ask another replica."""

    def __init__(self, expert: ExpertId) -> None:
        super().__init__(f"expert {expert} is not held here")
        self.expert = expert


class OutOfSlotsError(ExpertMeshError):
    """The caller's: every slot of the pool holds a replica. Drop one first, or use another host."""
