"""`/v1/models`: the base model and every adapter, as OpenAI clients and routers list them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterNotFound
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.api.adapter_access import AdapterAccess
from loraplex_server.api.context_limit import ContextLimit
from loraplex_server.api.errors import AdapterDraining, InvalidRequest, ModelNotFound
from loraplex_server.api.json_text import compact
from loraplex_server.api.principals import actor_of, namespace_of
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
    access = AdapterAccess(catalog)
    shapes = _ModelShapes(engine, base_names[0], created)

    @router.get("/v1/models", response_model=None)
    async def list_models(request: Request) -> Response:
        """List the base model, then all adapters by name that the caller may use."""
        reader = namespace_of(request).reader
        body = await asyncio.to_thread(_model_list, shapes, catalog, reader)
        return Response(body, media_type="application/json")

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str, request: Request) -> dict[str, Any]:
        """Describe the base model or one adapter."""
        if name in base_names:
            return shapes.base()
        try:
            return shapes.adapter(await asyncio.to_thread(access.find, namespace_of(request), name))
        except AdapterNotFound:
            raise ModelNotFound(name) from None

    @router.delete("/v1/models/{name:path}")
    async def delete_model(name: str, request: Request) -> dict[str, Any]:
        """Delete an adapter with all its versions; running requests finish."""
        if name in base_names:
            raise InvalidRequest("the base model cannot be deleted", param="model")
        try:
            known = await asyncio.to_thread(
                access.registered_name, namespace_of(request), name, to_change=True
            )
            await removals.remove(known, RemovalMode.DRAIN, DRAIN_S, actor_of(request))
        except AdapterNotFound:
            raise ModelNotFound(name) from None
        except AdapterDraining:
            pass  # it is gone for whoever asks; OpenAI's answer has no word for more
        return {"id": name, "object": "model", "deleted": True}

    return router


class _ModelShapes:
    """Writes models as OpenAI's, with the fields that vLLM and SGLang add."""

    def __init__(self, engine: EngineHandle, base_name: str, created: int) -> None:
        self._engine = engine
        self._base_name = base_name
        self._created = created

    def base(self) -> dict[str, Any]:
        return self._model(self._base_name, self._created, root=self._base_name, parent=None)

    def adapter(self, record: AdapterRecord) -> dict[str, Any]:
        model = self._model(record.name, record.created, root=record.id, parent=self._base_name)
        if model["max_model_len"] is not None:
            model["max_model_len"] = ContextLimit.of(model["max_model_len"], record).num_tokens
        return model

    def _model(self, name: str, created: int, *, root: str, parent: str | None) -> dict[str, Any]:
        try:
            max_model_len = self._engine.info.max_model_len
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


def _model_list(shapes: _ModelShapes, catalog: AdapterCatalog, reader: str | None) -> bytes:
    """Return the whole list as JSON: written in a thread, as it has no bound that clients know."""
    models = [compact(shapes.base())]
    models += [compact(shapes.adapter(record)) for record in all_adapters(catalog, reader)]
    return f'{{"object":"list","data":[{",".join(models)}]}}'.encode()


def all_adapters(catalog: AdapterCatalog, reader: str | None = None) -> Iterator[AdapterRecord]:
    """Yield every adapter by name that a tenant may read, page by page of the registry; blocks."""
    page = catalog.list(limit=_PAGE, reader=reader)
    yield from page
    while len(page) == _PAGE:
        page = catalog.list(limit=_PAGE, after=page[-1].name, reader=reader)
        yield from page
