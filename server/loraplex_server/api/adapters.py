"""`/v1/adapters`: the adapters that the server keeps, from upload to deletion."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import InvalidUpload
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.adapters.validation import Validation
from loraplex_server.api.adapter_access import AdapterAccess
from loraplex_server.api.adapter_bodies import (
    RollbackBody,
    SettingsBody,
    SourceBody,
    parse_body,
    record_body,
    validation_body,
)
from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.errors import InvalidRequest, TenantForbidden
from loraplex_server.api.json_text import compact
from loraplex_server.api.pool_map import Tiers
from loraplex_server.api.principals import actor_of, namespace_of, principal_of
from loraplex_server.api.removals import DRAIN_S, AdapterRemovals, FreedBytes, RemovalMode
from loraplex_server.api.upkeep import Upkeep, prefetch
from loraplex_server.api.uploads import AdapterUploads
from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.engine.handle import EngineHandle

_CLIENT_GONE: Final = 499
_MAX_DRAIN_S: Final = 86_400.0


def adapters_router(
    *,
    engine: EngineHandle,
    catalog: AdapterCatalog,
    adapter_names: AdapterNames,
    base_names: tuple[str, ...],
    uploads: AdapterUploads,
    removals: AdapterRemovals,
    upkeep: Upkeep,
    pinned_share: float,
) -> APIRouter:
    """Return the endpoints.

    Args:
        pinned_share: of the pool's pages, what pinned adapters may take together.
    """
    router = APIRouter(tags=["adapters"])
    access = AdapterAccess(catalog)

    async def changeable(name: str, request: Request) -> str:
        """Return what the catalogue calls an adapter that the caller may change."""
        namespace = namespace_of(request)
        return await asyncio.to_thread(access.registered_name, namespace, name, to_change=True)

    @router.post("/v1/adapters", status_code=201, response_model=None)
    async def add_adapter(request: Request) -> Response:
        """Register an adapter from its files (multipart) or from a source (JSON)."""
        try:
            if request.headers.get("content-type", "").startswith("application/json"):
                body = parse_body(SourceBody, await _json_of(request))
                record, is_new = await uploads.accept_source(body, request)
            else:
                record, is_new = await uploads.accept(request)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        if record.settings.pinned:
            await upkeep.keep_pinned()  # another version is current now
        return JSONResponse(
            record_body(record, Tiers(engine.stats)), status_code=201 if is_new else 200
        )

    @router.post("/v1/adapters/validate", response_model=None)
    async def validate_adapter(request: Request) -> Response:
        """Judge uploaded files as an upload would, and register nothing."""
        try:
            validation = await uploads.validate(request)
        except InvalidUpload as error:
            validation = Validation((error.reason,), None, None)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        return JSONResponse(validation_body(validation))

    @router.get("/v1/adapters", response_model=None)
    async def list_adapters(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: str | None = None,
    ) -> Response:
        """List adapters by name that the caller may use, those behind the name `after`."""
        reader = namespace_of(request).reader

        def page() -> bytes:
            records = catalog.list(limit=limit + 1, after=after, reader=reader)
            return _page(records, limit, engine, [record.name for record in records])

        return _json(await asyncio.to_thread(page))

    @router.get("/v1/adapters/{name:path}/versions", response_model=None)
    async def list_versions(
        name: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[int | None, Query(ge=1)] = None,
    ) -> Response:
        """List a name's versions, newest first, those behind the version `after`."""

        def page() -> bytes:
            known = access.registered_name(namespace_of(request), name)
            records = catalog.versions(known, limit=limit + 1, before=after)
            return _page(records, limit, engine, [record.version for record in records])

        return _json(await asyncio.to_thread(page))

    @router.get("/v1/adapters/{name:path}", response_model=None)
    async def get_adapter(name: str, request: Request) -> Response:
        """Describe one adapter, or one version of it (`name@sha256:...`)."""

        def describe() -> bytes:
            record = access.find(namespace_of(request), name)
            body = {**record_body(record, Tiers(engine.stats)), "report": catalog.report(record)}
            return compact(body).encode()

        return _json(await asyncio.to_thread(describe))

    @router.post("/v1/adapters/{name:path}/rollback")
    async def roll_back(name: str, body: RollbackBody, request: Request) -> dict[str, Any]:
        """Let the name stand for another of its versions."""
        record = await asyncio.to_thread(
            catalog.rollback,
            await changeable(name, request),
            version=body.version,
            adapter_id=body.id,
            actor=actor_of(request),
        )
        if record.settings.pinned:
            await upkeep.keep_pinned()
        return record_body(record, Tiers(engine.stats))

    @router.patch("/v1/adapters/{name:path}")
    async def change_adapter(name: str, body: SettingsBody, request: Request) -> dict[str, Any]:
        """Pin or unpin the adapter, set when it expires, its defaults, or who may use it."""
        if "pinned" in body.model_fields_set and not principal_of(request).is_admin:
            raise TenantForbidden("pinned adapters take memory from all: only admins can pin")
        known = await changeable(name, request)
        try:
            max_pages = int(engine.info.num_pages * pinned_share)
        except EngineUnavailable:
            if body.pinned:
                raise  # how large the pool is, is not known yet
            max_pages = None
        record = await asyncio.to_thread(
            catalog.change,
            known,
            body.settings(),
            max_pinned_pages=max_pages,
            actor=actor_of(request),
        )
        if "pinned" in body.model_fields_set:
            await upkeep.keep_pinned()
        return record_body(record, Tiers(engine.stats))

    @router.delete("/v1/adapters/{name:path}")
    async def delete_adapter(
        name: str,
        request: Request,
        mode: RemovalMode = RemovalMode.DRAIN,
        timeout_s: Annotated[float, Query(ge=0, le=_MAX_DRAIN_S)] = DRAIN_S,
    ) -> dict[str, Any]:
        """Delete a name or one version, and answer when all it took is free."""
        known = await changeable(name, request)
        record, freed = await removals.remove(known, mode, timeout_s, actor_of(request))
        return _deleted_body(name, record, freed)

    @router.post("/v1/adapters/{name:path}/prefetch", status_code=202)
    async def prefetch_adapter(name: str, request: Request) -> dict[str, Any]:
        """Hint that requests for the adapter will come soon; answers before anything is moved."""
        if name in base_names:
            raise InvalidRequest("the base model is always there; name an adapter", param="name")
        tiers = Tiers(engine.stats)
        known = await asyncio.to_thread(access.registered_name, namespace_of(request), name)
        adapter_id = await prefetch(engine, catalog, adapter_names, known)
        tier = tiers.of(adapter_id)
        return {"object": "adapter.prefetch", "name": name, "id": adapter_id, "tier": tier}

    return router


async def _json_of(request: Request) -> Any:
    raw = await request.body()
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        place, reason = getattr(error, "pos", 0), getattr(error, "msg", "not UTF-8, or too deep")
        problem = {"type": "json_invalid", "loc": ("body", place), "ctx": {"error": reason}}
        raise RequestValidationError([problem]) from error


def _page(
    records: tuple[AdapterRecord, ...], limit: int, engine: EngineHandle, cursors: list[Any]
) -> bytes:
    """Return a page of `limit` records; one more of them says that there are more.

    Written out in a thread, as reports and templates of many adapters are long.
    """
    tiers = Tiers(engine.stats)
    num_shown = min(limit, len(records))
    page = {
        "object": "list",
        "data": [record_body(record, tiers) for record in records[:limit]],
        "has_more": len(records) > limit,
        "last": cursors[num_shown - 1] if num_shown else None,
    }
    return compact(page).encode()


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _deleted_body(name: str, record: AdapterRecord, freed: FreedBytes) -> dict[str, Any]:
    return {
        "object": "adapter.deleted",
        "name": name,
        "id": record.id,
        "deleted": True,
        "freed": {
            "pool_bytes": freed.pool,
            "host_bytes": freed.host,
            "disk_bytes": freed.disk,
        },
    }
