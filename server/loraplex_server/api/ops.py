"""What operators and probes read: health, metrics, the pool, the version."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.pool_map import pool_map
from loraplex_server.engine.handle import EngineHandle
from loraplex_server.engine.messages import EngineState


def ops_router(
    *,
    engine: EngineHandle,
    adapter_names: AdapterNames,
    registry: CollectorRegistry,
    base_name: str,
) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(tags=["operations"])

    @router.get("/health", response_model=None)
    async def health() -> Response:
        """Answer 200 when requests can be computed, else 503."""
        is_ready = engine.state is EngineState.READY
        body = {
            "status": "ok" if is_ready else "unavailable",
            "engine": engine.state.value,
            "restarts": engine.num_restarts,
            "model": base_name,
        }
        if is_ready:
            return JSONResponse(body)
        return JSONResponse(body, status_code=503, headers={"retry-after": "5"})

    @router.get("/version")
    async def get_version() -> dict[str, str]:
        """Return the version of the server."""
        return {"version": version("loraplex")}

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Return all metrics in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/pool")
    async def pool() -> dict[str, Any]:
        """Return who holds the pool's pages, and what host memory keeps."""
        return pool_map(engine.stats, engine.info, adapter_names, base_name)

    return router
