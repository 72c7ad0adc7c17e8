"""vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, in its own words.

Better than there in two points: an adapter that cannot be served exactly is 422 with the reasons,
not 500, and unloading ends when the memory is free. Errors: `foreign_errors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response

from loraplex_server.adapters.errors import AdapterNotFound
from loraplex_server.api.errors import AdapterMissing, InvalidRequest
from loraplex_server.api.foreign_adapters import ForeignAdapters
from loraplex_server.api.principals import actor_of
from loraplex_server.api.strict_body import StrictBody

_CLIENT_GONE: Final = 499


class VllmLoad(StrictBody):
    """The body of `POST /v1/load_lora_adapter`."""

    #: The weights' own shapes tell what they are of.
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"is_3d_lora_weight": (False,)}

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class VllmUnload(StrictBody):
    """The body of `POST /v1/unload_lora_adapter`; adapters have no integer ids here."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"lora_int_id": ()}

    lora_name: str = ""


def vllm_adapters_router(adapters: ForeignAdapters) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(tags=["vLLM"])

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load_lora_adapter(body: VllmLoad, request: Request) -> Response:
        """Register the adapter at `lora_path` as `lora_name`."""
        name, path = body.lora_name, body.lora_path
        if not name or not path:
            raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.")
        if await adapters.is_loaded(name) and not body.load_inplace:
            raise InvalidRequest(
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True."
            )
        try:
            await adapters.load(name, path, replace=body.load_inplace, request=request)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload_lora_adapter(body: VllmUnload, request: Request) -> Response:
        """Delete `lora_name`; requests that run on it finish."""
        name = body.lora_name
        if not name:
            raise InvalidRequest("'lora_name' needs to be provided to unload a LoRA adapter.")
        try:
            await adapters.unload(name, actor_of(request))
        except AdapterNotFound:
            raise AdapterMissing(f"The lora adapter '{name}' cannot be found.") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return router
