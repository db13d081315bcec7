"""What a client or an operator may ask without generating: models, health, version, metrics and the mesh."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Any

from fastapi import APIRouter, Query
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic_core import to_json
from starlette.responses import JSONResponse, Response, StreamingResponse

from expertmesh.serve.backend import MeshView
from expertmesh.serve.mesh_metrics import MeshMetrics
from expertmesh.serve.surface import Surface

MAX_TRACE_S = 24 * 3600.0


def status_routes(surface: Surface) -> APIRouter:
    routes = APIRouter()
    card = surface.card
    mesh_metrics = MeshMetrics(surface.metrics.registry, surface.backend)
    model = {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "expertmesh",
        "root": card.root,
        "parent": None,
        "max_model_len": card.max_context,
        "vocab_size": card.vocab_size,
        "eos_token_ids": card.eos_token_ids,
    }

    @routes.get("/v1/models", tags=["OpenAI"])
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @routes.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def retrieve_model(name: str) -> dict[str, Any]:
        surface.check_model(name)
        return model

    @routes.get("/health", tags=["operation"])
    @routes.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
    async def health() -> Response:
        if await surface.backend.healthy():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable"}, 503, {"retry-after": "1"})

    @routes.get("/version", tags=["operation"])
    async def version() -> dict[str, str]:
        return {"version": metadata.version("expertmesh")}

    @routes.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        await mesh_metrics.refresh()
        return Response(generate_latest(surface.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @routes.get("/mesh/hosts", tags=["mesh"])
    async def hosts() -> Response:
        return await mesh("hosts")

    @routes.get("/mesh/routers", tags=["mesh"])
    async def routers() -> Response:
        return await mesh("routers")

    @routes.get("/mesh/placement", tags=["mesh"])
    async def placement() -> Response:
        return await mesh("placement")

    @routes.get("/mesh/load", tags=["mesh"])
    async def load() -> Response:
        return await mesh("load")

    @routes.get("/mesh/decisions", tags=["mesh"])
    async def decisions() -> Response:
        return await mesh("decisions")

    @routes.get("/mesh/moves", tags=["mesh"])
    async def moves() -> Response:
        return await mesh("moves")

    @routes.get("/mesh/trace", tags=["mesh"])
    async def trace(seconds: Annotated[float, Query(gt=0, le=MAX_TRACE_S)]) -> StreamingResponse:
        """What the gates choose from now on, as a routing trace (msgpack), for so long."""
        return StreamingResponse(surface.backend.trace(seconds), media_type="application/vnd.msgpack")

    async def mesh(view: MeshView) -> Response:
        return Response(to_json(await surface.backend.mesh(view)), media_type="application/json")

    return routes
