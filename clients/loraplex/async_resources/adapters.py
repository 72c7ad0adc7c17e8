"""The adapters that the server keeps."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from loraplex.adapter_options import AdapterSettings, RegisterOptions
from loraplex.calls import adapters
from loraplex.multipart import Progress
from loraplex.types import Adapter, AdapterDeleted, AdapterPrefetch, AdapterValidation

if TYPE_CHECKING:
    from loraplex.async_client import AsyncClient


class AsyncAdapters:
    """The adapters that the server keeps."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def push(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        on_progress: Progress | None = None,
        **options: Unpack[RegisterOptions],
    ) -> Adapter:
        """Upload an adapter. Pushing the same content under the same name again is no error.

        Args:
            path: A PEFT folder, or a .zip, .tar, .tar.gz or .tgz of one.
            name: What requests will call it; default: the folder's or the archive's name.
            on_progress: Called with (bytes sent, bytes in total).
            options: The fields of `RegisterOptions`.

        Raises:
            AdapterFilesError: There is no adapter to send at `path`.
            ConflictError: The name holds other content, which is not to be replaced.
            UnprocessableEntityError: The server cannot serve it exactly; `reasons` says why.
        """
        return await self._client.send(
            adapters.push_adapter(Path(path), name, on_progress, options)
        )

    def list(self, *, page_size: int = 100) -> AsyncIterator[Adapter]:
        """Iterate over every adapter, fetching pages as they are needed."""
        return self._client.items(adapters.list_adapters(page_size))

    async def get(self, name: str) -> Adapter:
        """Return one adapter, or raise NotFoundError."""
        return await self._client.send(adapters.get_adapter(name))

    async def delete(
        self,
        name: str,
        *,
        mode: Literal["drain", "cancel"] | None = None,
        timeout_s: float | None = None,
    ) -> AdapterDeleted:
        """Delete a name with all its versions, or the one version `name@sha256:...`.

        Returns when nobody uses it any more and what it took is free.

        Args:
            name: Unknown to requests from the start.
            mode: Wait for the requests that run ("drain", the server's default), or end them.
            timeout_s: How long the server waits for them.

        Raises:
            NotFoundError: No adapter has this name.
            InternalServerError: 504; requests still run. The name is gone all the same.
        """
        return await self._client.send(adapters.delete_adapter(name, mode, timeout_s))

    async def fetch(
        self,
        name: str,
        source: str,
        *,
        sha256: str | None = None,
        **options: Unpack[RegisterOptions],
    ) -> Adapter:
        """Have the server fetch an adapter and register it.

        Args:
            name: What requests will call it.
            source: `https:`, `s3:`, `gs:`, `hf:` or `file:`; an archive or a folder.
            sha256: Of the archive, or of the safetensors file; other content is refused.
            options: The fields of `RegisterOptions`.
        """
        return await self._client.send(adapters.fetch_adapter(name, source, sha256, options))

    async def validate(
        self,
        path: str | os.PathLike[str],
        *,
        check_base: bool = True,
        on_progress: Progress | None = None,
    ) -> AdapterValidation:
        """Return what the server would make of an adapter; it registers nothing."""
        return await self._client.send(
            adapters.validate_adapter(Path(path), check_base, on_progress)
        )

    def versions(self, name: str, *, page_size: int = 100) -> AsyncIterator[Adapter]:
        """Iterate over the versions of a name, newest first."""
        return self._client.items(adapters.list_versions(name, page_size))

    async def rollback(
        self, name: str, *, version: int | None = None, adapter_id: str | None = None
    ) -> Adapter:
        """Let a name stand for another of its versions, by its number or its id."""
        return await self._client.send(adapters.roll_back_adapter(name, version, adapter_id))

    async def change(self, name: str, **settings: Unpack[AdapterSettings]) -> Adapter:
        """Change the given fields of `AdapterSettings`; the others stay as they are."""
        return await self._client.send(adapters.change_adapter(name, settings))

    async def pin(self, name: str) -> Adapter:
        """Keep an adapter in the pool once it is there; ConflictError if there is no room."""
        return await self.change(name, pinned=True)

    async def unpin(self, name: str) -> Adapter:
        """Let an adapter leave the pool again."""
        return await self.change(name, pinned=False)

    async def prefetch(self, name: str) -> AdapterPrefetch:
        """Tell the server that requests for an adapter will come soon.

        It answers at once, with where the adapter is now, and brings it nearer as its time and its
        memory allow: a hint, on which nothing may depend.

        Raises:
            NotFoundError: No adapter has this name.
            BadRequestError: It is the base model's.
        """
        return await self._client.send(adapters.prefetch_adapter(name))
