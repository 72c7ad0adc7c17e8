"""`/v1/adapters`: upload, list, describe and delete adapters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Final, TypeVar

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterError, UploadTooLarge
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.adapters.upload import UploadStaging
from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.errors import InvalidRequest, TooManyUploads, UploadStalled
from loraplex_server.api.pool_map import Tiers
from loraplex_server.api.upload import UploadForm, UploadReceiver, boundary_of
from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.engine.handle import EngineHandle

_T = TypeVar("_T")

#: Received bytes are handed to the disk in pieces of about this size.
_PIECE_BYTES: Final = 1 << 20
#: How much of a refused upload is still read, so that its sender gets to read the answer.
_DRAIN_BYTES: Final = 64 << 20
_DRAIN_S: Final = 5.0
#: Room for multipart boundaries and headers beside the files.
_FRAMING_BYTES: Final = 64 << 10
_MAX_UPLOADS_AT_WORK: Final = 4
#: Being received or waiting for their turn; each holds a folder and a connection.
_MAX_OPEN_UPLOADS: Final = 16
#: A sender that is silent for so long is gone.
_IDLE_S: Final = 60.0
_CLIENT_GONE: Final = 499


def adapters_router(
    *,
    engine: EngineHandle,
    catalog: AdapterCatalog,
    adapter_names: AdapterNames,
    base_names: tuple[str, ...],
    max_upload_bytes: int,
) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(tags=["adapters"])
    uploads = AdapterUploads(engine, catalog, max_upload_bytes)

    @router.post("/v1/adapters", status_code=201, response_model=None)
    async def upload_adapter(request: Request) -> Response:
        """Register an adapter from its PEFT files (`files`) or an archive of them (`archive`)."""
        try:
            record, is_new = await uploads.accept(request)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        return JSONResponse(
            _record_body(record, Tiers(engine.stats)), status_code=201 if is_new else 200
        )

    @router.get("/v1/adapters")
    async def list_adapters(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100, after: str | None = None
    ) -> dict[str, Any]:
        """List adapters by name, those behind the name `after`."""
        records = await asyncio.to_thread(catalog.list, limit=limit + 1, after=after)
        shown, tiers = records[:limit], Tiers(engine.stats)
        return {
            "object": "list",
            "data": [_record_body(record, tiers) for record in shown],
            "has_more": len(records) > limit,
            "last": shown[-1].name if shown else None,
        }

    @router.get("/v1/adapters/{name:path}")
    async def get_adapter(name: str) -> dict[str, Any]:
        """Describe one adapter."""
        return _record_body(await asyncio.to_thread(catalog.get, name), Tiers(engine.stats))

    @router.delete("/v1/adapters/{name:path}")
    async def delete_adapter(name: str) -> dict[str, Any]:
        """Take the name away; running requests finish."""
        record = await asyncio.to_thread(catalog.delete, name)
        adapter_names.forget(record.id, name)
        return {"object": "adapter.deleted", "name": name, "id": record.id, "deleted": True}

    @router.post("/v1/adapters/{name:path}/prefetch", status_code=202)
    async def prefetch_adapter(name: str) -> dict[str, Any]:
        """Hint that requests for the adapter will come soon; answers before anything is moved."""
        if name in base_names:
            raise InvalidRequest("the base model is always there; name an adapter", param="name")
        lease = await asyncio.to_thread(catalog.acquire, name)
        try:
            tier = Tiers(engine.stats).of(lease.record.id)
            adapter_names.remember(lease.record.id, name)
            engine.prefetch(lease.manifest)
        finally:
            # The file may go once nobody has a lease; a hint is worth no more than that.
            await asyncio.to_thread(lease.release)
        return {"object": "adapter.prefetch", "name": name, "id": lease.record.id, "tier": tier}

    return router


class AdapterUploads:
    """Receives uploads; disk and tensor work runs in a few threads of its own."""

    def __init__(
        self, engine: EngineHandle, catalog: AdapterCatalog, max_upload_bytes: int
    ) -> None:
        self._engine = engine
        self._catalog = catalog
        self._max_upload_bytes = max_upload_bytes
        self._num_open = 0
        self._threads = anyio.CapacityLimiter(_MAX_UPLOADS_AT_WORK)

    async def accept(self, request: Request) -> tuple[AdapterRecord, bool]:
        """Receive and register one adapter; leaves nothing behind when it fails.

        Raises:
            ClientDisconnect: the sender is gone.
            AdapterError, ApiError: see the error table.
        """
        if self._num_open >= _MAX_OPEN_UPLOADS:
            raise TooManyUploads(f"{self._num_open} uploads are open already; try again shortly")
        self._num_open += 1
        try:
            return await self._accept(request)
        finally:
            self._num_open -= 1

    async def _accept(self, request: Request) -> tuple[AdapterRecord, bool]:
        boundary = boundary_of(request.headers.get("content-type", ""))
        chunks = request.stream()
        staging = await self._in_thread(self._catalog.new_upload)
        try:
            try:
                self._check_length(request)
                form = await self._receive(chunks, boundary, staging)
            except (AdapterError, InvalidRequest):
                await _drain(chunks)
                raise
            return await self._in_thread(lambda: self._register(form, staging))
        finally:
            with anyio.CancelScope(shield=True):
                await self._in_thread(staging.close)

    def _check_length(self, request: Request) -> None:
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_upload_bytes + _FRAMING_BYTES:
            raise UploadTooLarge(self._max_upload_bytes)

    async def _receive(
        self, chunks: AsyncIterator[bytes], boundary: bytes, staging: UploadStaging
    ) -> UploadForm:
        receiver = UploadReceiver(
            boundary,
            staging,
            self._catalog.check_name,
            max_body_bytes=self._max_upload_bytes + _FRAMING_BYTES,
        )
        try:
            async for piece in _pieces(chunks):
                await self._in_thread(lambda data=piece: receiver.feed(data))  # type: ignore[misc]
            return receiver.finish()
        finally:
            receiver.close()

    def _register(self, form: UploadForm, staging: UploadStaging) -> tuple[AdapterRecord, bool]:
        try:
            max_pages = self._engine.info.num_pages
        except EngineUnavailable:
            max_pages = None
        return self._catalog.register(
            form.name, staging.finish(), check_base=form.check_base, max_pages=max_pages
        )

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await anyio.to_thread.run_sync(work, limiter=self._threads)


async def _pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Join small chunks, so that few of them cross into a thread."""
    buffer = bytearray()
    while (chunk := await _next_chunk(chunks)) is not None:
        buffer += chunk
        if len(buffer) >= _PIECE_BYTES:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


async def _next_chunk(chunks: AsyncIterator[bytes]) -> bytes | None:
    try:
        async with asyncio.timeout(_IDLE_S):
            return await anext(chunks, None)
    except TimeoutError:
        raise UploadStalled(f"nothing came for {_IDLE_S:.0f} s; nothing was kept") from None


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    num_bytes = 0
    with contextlib.suppress(ClientDisconnect, TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            async for chunk in chunks:
                num_bytes += len(chunk)
                if num_bytes > _DRAIN_BYTES:
                    return


def _record_body(record: AdapterRecord, tiers: Tiers) -> dict[str, Any]:
    tier = tiers.of(record.id)
    return {
        "object": "adapter",
        "name": record.name,
        "id": record.id,
        "base_model": record.base_model,
        "rank_max": record.rank_max,
        "target_modules": list(record.target_modules),
        "size_bytes": record.size_bytes,
        "pool_pages": record.pool_pages,
        "created": record.created,
        "state": "registered" if tier == "disk" else tier,
    }
