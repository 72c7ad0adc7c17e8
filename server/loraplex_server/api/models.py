"""`/v1/models`: the base model and every adapter, as OpenAI clients and routers list them."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterNotFound
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.api.errors import AdapterDraining, InvalidRequest, ModelNotFound
from loraplex_server.api.removals import DRAIN_S, AdapterRemovals, RemovalMode
from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.engine.handle import EngineHandle

_PAGE = 1000


def models_router(
    *,
    engine: EngineHandle,
    catalog: AdapterCatalog,
    base_names: tuple[str, ...],
    created: int,
    removals: AdapterRemovals,
) -> APIRouter:
    """Return the endpoints; the base model shows `created`, the time the server started."""
    router = APIRouter(tags=["models"])

    def base_model() -> dict[str, Any]:
        return _model(base_names[0], created, root=base_names[0], parent=None, engine=engine)

    def adapter_model(record: AdapterRecord) -> dict[str, Any]:
        parent = base_names[0]
        return _model(record.name, record.created, root=record.id, parent=parent, engine=engine)

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the base model, then all adapters by name."""
        records = await asyncio.to_thread(_all_records, catalog)
        return {"object": "list", "data": [base_model(), *map(adapter_model, records)]}

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        """Describe the base model or one adapter."""
        if name in base_names:
            return base_model()
        try:
            return adapter_model(await asyncio.to_thread(catalog.get, name))
        except AdapterNotFound:
            raise ModelNotFound(name) from None

    @router.delete("/v1/models/{name:path}")
    async def delete_model(name: str) -> dict[str, Any]:
        """Delete an adapter with all its versions; running requests finish."""
        if name in base_names:
            raise InvalidRequest("the base model cannot be deleted", param="model")
        try:
            await removals.remove(name, RemovalMode.DRAIN, DRAIN_S)
        except AdapterNotFound:
            raise ModelNotFound(name) from None
        except AdapterDraining:
            pass  # it is gone for whoever asks; OpenAI's answer has no word for more
        return {"id": name, "object": "model", "deleted": True}

    return router


def _all_records(catalog: AdapterCatalog) -> list[AdapterRecord]:
    records: list[AdapterRecord] = []
    while True:
        page = catalog.list(limit=_PAGE, after=records[-1].name if records else None)
        records += page
        if len(page) < _PAGE:
            return records


def _model(
    name: str, created: int, *, root: str, parent: str | None, engine: EngineHandle
) -> dict[str, Any]:
    try:
        max_model_len = engine.info.max_model_len
    except EngineUnavailable:
        max_model_len = None
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "loraplex",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
    }
