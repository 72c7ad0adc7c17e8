"""`/v1/models`: the base model and every adapter, as OpenAI clients and routers list them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterNotFound
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.api.context_limit import ContextLimit
from loraplex_server.api.errors import AdapterDraining, InvalidRequest, ModelNotFound
from loraplex_server.api.json_text import compact
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
    shapes = _ModelShapes(engine, base_names[0], created)

    @router.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        """List the base model, then all adapters by name."""
        body = await asyncio.to_thread(_model_list, shapes, catalog)
        return Response(body, media_type="application/json")

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        """Describe the base model or one adapter."""
        if name in base_names:
            return shapes.base()
        try:
            return shapes.adapter(await asyncio.to_thread(catalog.get, name))
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


def _model_list(shapes: _ModelShapes, catalog: AdapterCatalog) -> bytes:
    """Return the whole list as JSON: written in a thread, as it has no bound that clients know."""
    models = [compact(shapes.base())]
    models += [compact(shapes.adapter(record)) for record in all_adapters(catalog)]
    return f'{{"object":"list","data":[{",".join(models)}]}}'.encode()


def all_adapters(catalog: AdapterCatalog) -> Iterator[AdapterRecord]:
    """Yield every adapter by name, one page of the registry after another; blocks."""
    page = catalog.list(limit=_PAGE)
    yield from page
    while len(page) == _PAGE:
        page = catalog.list(limit=_PAGE, after=page[-1].name)
        yield from page
