"""What operators and probes read: health, readiness, load, metrics, the pool, the version."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.drain import Drain
from loraplex_server.api.generations import Generations
from loraplex_server.api.ops_schemas import HealthAnswer, LoadAnswer, PoolAnswer, ReadyAnswer
from loraplex_server.api.pool_map import pool_map
from loraplex_server.engine.handle import EngineHandle
from loraplex_server.engine.messages import EngineState

#: When to ask again whether the engine is back.
_RETRY: Final = {"retry-after": "5"}


def ops_router(
    *,
    engine: EngineHandle,
    adapter_names: AdapterNames,
    generations: Generations,
    drain: Drain,
    registry: CollectorRegistry,
    base_name: str,
) -> APIRouter:
    """Return the endpoints; GET ones, which `Envelope` answers for HEAD too."""
    router = APIRouter(tags=["operations"])

    def readiness() -> str:
        if drain.is_draining:
            return "draining"
        return "ready" if engine.state is EngineState.READY else "engine_" + engine.state.value

    @router.get("/health", response_model=None, responses=_both(HealthAnswer))
    async def health() -> Response:
        """Answer 200 when the process lives and its engine can compute, else 503.

        A server that drains is healthy: see `/ready`.
        """
        is_ready = engine.state is EngineState.READY
        body = {
            "status": "ok" if is_ready else "unavailable",
            "engine": engine.state.value,
            "restarts": engine.num_restarts,
            "model": base_name,
        }
        return _probe(body, is_good=is_ready)

    @router.get("/ready", response_model=None, responses=_both(ReadyAnswer))
    async def ready() -> Response:
        """Answer 200 when new requests are welcome, else 503: for load balancers."""
        status = readiness()
        return _probe({"status": status}, is_good=status == "ready")

    @router.get("/ping", response_model=None, responses=_both(ReadyAnswer))
    async def ping() -> Response:
        """Answer as `/ready` does, where SageMaker asks."""
        return await ready()

    @router.get("/load", response_model=LoadAnswer)
    async def load() -> dict[str, int]:
        """Count the requests under way, as vLLM's `/load` does, and the engine's sequences."""
        stats = engine.stats
        return {
            "server_load": generations.num_jobs,
            "running": stats.num_running,
            "waiting": stats.num_waiting,
        }

    @router.get("/version")
    async def get_version() -> dict[str, str]:
        """Return the version of the server."""
        return {"version": version("loraplex")}

    @router.get(
        "/metrics",
        response_model=None,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Return all metrics in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/pool", response_model=None, responses={200: {"model": PoolAnswer}})
    async def pool() -> JSONResponse:
        """Return who holds the pool's pages, and what host memory keeps."""
        return JSONResponse(pool_map(engine.stats, engine.info, adapter_names, base_name))

    return router


def _probe(body: dict[str, Any], *, is_good: bool) -> JSONResponse:
    if is_good:
        return JSONResponse(body)
    return JSONResponse(body, status_code=503, headers=_RETRY)


def _both(model: type) -> dict[int | str, dict[str, Any]]:
    """Return how a probe is described: it says the same with either status."""
    return {200: {"model": model}, 503: {"model": model, "description": "Not now"}}
