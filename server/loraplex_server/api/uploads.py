"""Adapters on their way in, by upload or by source: bounded, in threads of their own, and gone from
the disk whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread
from starlette.requests import ClientDisconnect, Request

from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterError, UploadTooLarge
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.adapters.sources.fetch import FetchCancelled, fetch
from loraplex_server.adapters.sources.source import SourcePolicy, parse_source
from loraplex_server.adapters.upload import UploadStaging
from loraplex_server.adapters.validation import Validation
from loraplex_server.api.adapter_bodies import SourceBody
from loraplex_server.api.adapter_owners import AdapterOwners, policy_for
from loraplex_server.api.errors import InvalidRequest, TooManyUploads, UploadStalled
from loraplex_server.api.principals import namespace_of, principal_of
from loraplex_server.api.upload import UploadForm, UploadReceiver, boundary_of
from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.engine.handle import EngineHandle

_T = TypeVar("_T")

#: Received bytes are handed to the disk in pieces of about this size.
_PIECE_BYTES: Final = 1 << 20
#: How much of a refused upload is still read, so that its sender gets to read the answer.
_DRAIN_BYTES: Final = 64 << 20
_DRAIN_S: Final = 5.0
#: Room for multipart boundaries, headers and values beside the files.
_FRAMING_BYTES: Final = 512 << 10
_MAX_AT_WORK: Final = 4
#: A source may be slow for half an hour.
_MAX_FETCHES: Final = 4
#: Being read and folded, which takes minutes and a few copies of a linear's weight.
_MAX_READ: Final = 2
#: Being received or waiting for their turn; each holds a folder and a connection.
_MAX_OPEN: Final = 16
#: A sender that is silent for so long is gone.
_IDLE_S: Final = 60.0


class AdapterUploads:
    """Used from the event loop; disk and tensor work runs in a few threads of its own."""

    def __init__(
        self,
        engine: EngineHandle,
        catalog: AdapterCatalog,
        *,
        max_upload_bytes: int,
        source_policy: SourcePolicy,
        owners: AdapterOwners,
    ) -> None:
        self._engine = engine
        self._catalog = catalog
        self._max_upload_bytes = max_upload_bytes
        self._policy = source_policy
        self._owners = owners
        self._num_open = 0
        self._threads = anyio.CapacityLimiter(_MAX_AT_WORK)
        # Apart, or long readings would keep others from being received, fetched and refused.
        self._readers = anyio.CapacityLimiter(_MAX_READ)
        self._fetchers = anyio.CapacityLimiter(_MAX_FETCHES)

    async def accept(self, request: Request) -> tuple[AdapterRecord, bool]:
        """Receive and register one adapter; leaves nothing behind when it fails.

        Raises:
            ClientDisconnect: the sender is gone.
            AdapterError, ApiError: see the error table.
        """
        async with self._received(request) as (form, staging):
            wish = await self._owners.owned(form.registration(), request)
            return await self._read(
                lambda: self._catalog.register(wish, staging.finish(), max_pages=self._max_pages())
            )

    async def validate(self, request: Request) -> Validation:
        """Receive one adapter and judge it as `accept` does, but register nothing."""
        async with self._received(request, needs_name=False) as (form, staging):
            return await self._read(
                lambda: self._catalog.validate(
                    staging.finish(),
                    check_base=form.options.check_base,
                    max_pages=self._max_pages(),
                )
            )

    async def accept_source(self, body: SourceBody, request: Request) -> tuple[AdapterRecord, bool]:
        """Fetch and register one adapter; given up when the client goes.

        Raises:
            ClientDisconnect: the client is gone.
            AdapterError, ApiError: see the error table.
        """
        policy = policy_for(principal_of(request), self._policy, body.source)
        source = parse_source(body.source, policy)
        self._check_name(request)(body.name)
        cancelled = threading.Event()
        async with self._staging() as staging:
            watcher = asyncio.create_task(_cancel_when_gone(request, cancelled))
            try:
                await anyio.to_thread.run_sync(
                    lambda: fetch(source, policy, staging, sha256=body.digits, cancelled=cancelled),
                    limiter=self._fetchers,
                )
            except FetchCancelled:
                raise ClientDisconnect from None
            finally:
                cancelled.set()
                watcher.cancel()
            wish = await self._owners.owned(body.registration(source.public_url), request)
            return await self._read(
                lambda: self._catalog.register(wish, staging.finish(), max_pages=self._max_pages())
            )

    @contextlib.asynccontextmanager
    async def _staging(self) -> AsyncIterator[UploadStaging]:
        if self._num_open >= _MAX_OPEN:
            raise TooManyUploads(f"{self._num_open} uploads are open already; try again shortly")
        self._num_open += 1
        try:
            staging = await self._in_thread(self._catalog.new_upload)
            try:
                yield staging
            finally:
                with anyio.CancelScope(shield=True):
                    await self._in_thread(staging.close)
        finally:
            self._num_open -= 1

    @contextlib.asynccontextmanager
    async def _received(
        self, request: Request, *, needs_name: bool = True
    ) -> AsyncIterator[tuple[UploadForm, UploadStaging]]:
        boundary = boundary_of(request.headers.get("content-type", ""))
        chunks = request.stream()
        async with self._staging() as staging:
            try:
                self._check_length(request)
                receiver = UploadReceiver(
                    boundary,
                    staging,
                    self._check_name(request),
                    max_body_bytes=self._max_upload_bytes + _FRAMING_BYTES,
                    needs_name=needs_name,
                )
                form = await self._receive(chunks, receiver)
            except (AdapterError, InvalidRequest):
                await _drain(chunks)
                raise
            yield form, staging

    def _check_name(self, request: Request) -> Callable[[str], None]:
        """Return what checks the name that a caller gives, and the one it stands for."""
        namespace = namespace_of(request)

        def check(name: str) -> None:
            self._catalog.check_name(name)
            self._catalog.check_name(namespace.name_for(name))

        return check

    def _check_length(self, request: Request) -> None:
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_upload_bytes + _FRAMING_BYTES:
            raise UploadTooLarge(self._max_upload_bytes)

    async def _receive(self, chunks: AsyncIterator[bytes], receiver: UploadReceiver) -> UploadForm:
        try:
            async for piece in _pieces(chunks):
                await self._in_thread(lambda data=piece: receiver.feed(data))  # type: ignore[misc]
            return receiver.finish()
        finally:
            receiver.close()

    def _max_pages(self) -> int | None:
        try:
            return self._engine.info.num_pages
        except EngineUnavailable:
            return None

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await anyio.to_thread.run_sync(work, limiter=self._threads)

    async def _read(self, work: Callable[[], _T]) -> _T:
        return await anyio.to_thread.run_sync(work, limiter=self._readers)


async def _cancel_when_gone(request: Request, cancelled: threading.Event) -> None:
    """Watch a connection whose request was read to its end."""
    message: dict[str, Any] = {}
    while message.get("type") != "http.disconnect":
        message = dict(await request.receive())
    cancelled.set()


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
