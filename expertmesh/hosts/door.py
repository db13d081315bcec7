"""Who may talk to a host over gRPC: those with a certificate of the mesh, if it has any, and always with its token.

Knows nothing of what is asked for. Invariant: of a call without the token not even the message is read.
"""

from __future__ import annotations

import hmac
import logging
from typing import TYPE_CHECKING, Any

import grpc

from expertmesh.errors import ConfigError
from expertmesh.refusals import RefusalLog
from expertmesh.tls import live_identity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from expertmesh.tls import Identity, TlsFiles

logger = logging.getLogger(__name__)


def open_port(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    """Have `server` listen at `address`, encrypted if there are `tls` files: the port.

    Raises ConfigError when the port is taken, or a file will not do.
    """
    trust = None if tls is None else _credentials(tls)
    try:
        return server.add_insecure_port(address) if trust is None else server.add_secure_port(address, trust)
    except RuntimeError as error:
        bind, _, port = address.rpartition(":")
        raise ConfigError(f"port {port} on {bind} cannot be bound; is it in use?") from error


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Those of the files as they are when somebody connects: whoever is connected stays so when they are replaced."""
    live = live_identity(tls)
    used = live.current()

    def replaced() -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks before each handshake, on a thread of its own."""
        nonlocal used
        current = live.current()
        if current is used:
            return None
        used = current
        return _configuration(current)

    fetch: Any = replaced  # gRPC's stubs do not know of None, which its documentation does
    return grpc.dynamic_ssl_server_credentials(_configuration(used), fetch, require_client_authentication=True)


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], identity.ca)


class TokenCheck(grpc.aio.ServerInterceptor):
    """Ends every call that does not carry the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        refusals = RefusalLog(logger)

        async def refuse(_requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
            peer, _, _port = context.peer().rpartition(":")
            refusals.refused(peer, "wrong or missing token")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing token")

        # A handler of single requests would be called once the request is there, however long that is or takes.
        self._refuse: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        given = dict(details.invocation_metadata or ()).get("authorization", "")
        if isinstance(given, str) and hmac.compare_digest(given.encode(), self._expected):
            return await continuation(details)
        return self._refuse
