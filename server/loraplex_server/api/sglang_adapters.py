"""SGLang's `/load_lora_adapter` and `/unload_lora_adapter`, in its own words.

Failures have its shape too: `success` false, and why in `error_message`; see `foreign_errors`.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from loraplex_server.adapters.errors import AdapterNotFound
from loraplex_server.api.errors import AdapterMissing, InvalidRequest
from loraplex_server.api.foreign_adapters import ForeignAdapters
from loraplex_server.api.principals import actor_of
from loraplex_server.api.strict_body import StrictBody

_CLIENT_GONE: Final = 499


class SglangLoad(StrictBody):
    """The body of `POST /load_lora_adapter`."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    pinned: bool = False


class SglangUnload(StrictBody):
    """The body of `POST /unload_lora_adapter`."""

    lora_name: str = Field(min_length=1)


def sglang_adapters_router(adapters: ForeignAdapters) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(tags=["SGLang"])

    async def success() -> dict[str, Any]:
        return {"success": True, "error_message": "", "loaded_adapters": await adapters.loaded()}

    @router.post("/load_lora_adapter", response_model=None)
    async def load_lora_adapter(body: SglangLoad, request: Request) -> Response:
        """Register the adapter at `lora_path` as `lora_name`, and pin it if asked."""
        if await adapters.is_loaded(body.lora_name):
            raise InvalidRequest(f"LoRA with name {body.lora_name} already exists.")
        try:
            await adapters.load(body.lora_name, body.lora_path, replace=False, request=request)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        if body.pinned:
            await adapters.pin(body.lora_name, actor_of(request))
        return JSONResponse(await success())

    @router.post("/unload_lora_adapter", response_model=None)
    async def unload_lora_adapter(body: SglangUnload, request: Request) -> Response:
        """Delete `lora_name`; requests that run on it finish."""
        try:
            await adapters.unload(body.lora_name, actor_of(request))
        except AdapterNotFound:
            raise AdapterMissing(f"LoRA with name {body.lora_name} does not exist.") from None
        return JSONResponse(await success())

    return router
