"""What an operator may order: scale a pool, give it back to its load, drain a host, plan anew.

Whoever orders shows the mesh's shared token; looking is free, and is in `status`. Knows nothing of how an order is
carried out. Invariant: no order reaches the backend without the token.
"""

from __future__ import annotations

import secrets
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request

from expertmesh.errors import InvalidRequestError
from expertmesh.serve.backend import Backend
from expertmesh.serve.schemas import DrainBody, FaultBody, PoolBody, RebalanceBody, ScaleBody


def operation_routes(backend: Backend, token: str) -> APIRouter:
    """POST /mesh/...; each answers as soon as the order is accepted, and /mesh/moves shows what comes of it."""
    expected = f"Bearer {token}".encode()

    async def authorized(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if not secrets.compare_digest(given, expected):
            raise InvalidRequestError(
                "send the mesh's shared token, as `Authorization: Bearer ...`", status=401, code="invalid_api_key"
            )

    routes = APIRouter(prefix="/mesh", tags=["mesh"], dependencies=[Depends(authorized)])

    @routes.post("/scale")
    async def scale(body: ScaleBody) -> Any:
        """Have a pool keep so many hosts, until /mesh/auto."""
        return await backend.order("scale", {"pool": body.pool, "hosts": body.hosts})

    @routes.post("/auto")
    async def auto(body: PoolBody) -> Any:
        """Have a pool follow its load again."""
        return await backend.order("auto", {"pool": body.pool})

    @routes.post("/drain")
    async def drain(body: DrainBody) -> Any:
        """Empty a host, then stop it."""
        return await backend.order("drain", {"host": body.host})

    @routes.post("/rebalance")
    async def rebalance(body: RebalanceBody) -> Any:
        """Weigh the placement against the load now."""
        return await backend.order("rebalance", {})

    @routes.post("/fault")
    async def fault(body: FaultBody) -> Any:
        """Break a host, a router or the controller, if the mesh was started for that: what fired so far."""
        return await backend.order("fault", body.model_dump(mode="json"))

    return routes
