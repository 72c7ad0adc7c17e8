"""The operations of `AsyncClient`; `loraplex.resources` says more about each."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, overload

from loraplex import calls
from loraplex.adapter_options import AdapterSettings, RegisterOptions
from loraplex.base_client import next_cursor
from loraplex.multipart import Progress
from loraplex.options import ChatOptions, CompletionOptions, Messages, Prompt
from loraplex.stream import AsyncStream
from loraplex.types import (
    Adapter,
    AdapterDeleted,
    AdapterPrefetch,
    AdapterValidation,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Model,
)

if TYPE_CHECKING:
    from loraplex.async_client import AsyncClient


class AsyncCompletions:
    """Text in, text out."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @overload
    async def create(
        self,
        *,
        model: str,
        prompt: Prompt,
        stream: Literal[False] = False,
        **options: Unpack[CompletionOptions],
    ) -> Completion: ...
    @overload
    async def create(
        self,
        *,
        model: str,
        prompt: Prompt,
        stream: Literal[True],
        **options: Unpack[CompletionOptions],
    ) -> AsyncStream[CompletionChunk]: ...
    async def create(
        self,
        *,
        model: str,
        prompt: Prompt,
        stream: bool = False,
        **options: Unpack[CompletionOptions],
    ) -> Completion | AsyncStream[CompletionChunk]:
        """Continue a prompt: a string, token ids, or a list of either."""
        if stream:
            return await self._client.open_stream(calls.stream_completion(model, prompt, options))
        return await self._client.send(calls.create_completion(model, prompt, options))


class AsyncChat:
    """Messages in, a message out."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @overload
    async def create(
        self,
        *,
        model: str,
        messages: Messages,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion: ...
    @overload
    async def create(
        self,
        *,
        model: str,
        messages: Messages,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> AsyncStream[ChatCompletionChunk]: ...
    async def create(
        self,
        *,
        model: str,
        messages: Messages,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]:
        """Answer a conversation."""
        if stream:
            return await self._client.open_stream(calls.stream_chat(model, messages, options))
        return await self._client.send(calls.create_chat(model, messages, options))


class AsyncModels:
    """The names that requests can put in `model`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[Model]:
        """Return the base model and every adapter."""
        return (await self._client.send(calls.list_models())).data

    async def retrieve(self, model_id: str) -> Model:
        """Return one of them."""
        return await self._client.send(calls.retrieve_model(model_id))


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
        """Upload an adapter. Pushing the same content under the same name again is no error."""
        return await self._client.send(calls.push_adapter(Path(path), name, on_progress, options))

    async def list(self, *, page_size: int = 100) -> AsyncIterator[Adapter]:
        """Iterate over every adapter, fetching pages as they are needed."""
        after: str | None = None
        while True:
            page = await self._client.send(calls.list_adapters(page_size, after))
            for adapter in page.data:
                yield adapter
            after = next_cursor(page, after)
            if after is None:
                return

    async def get(self, name: str) -> Adapter:
        """Return one adapter, or raise NotFoundError."""
        return await self._client.send(calls.get_adapter(name))

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
        return await self._client.send(calls.delete_adapter(name, mode, timeout_s))

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
        return await self._client.send(calls.fetch_adapter(name, source, sha256, options))

    async def validate(
        self,
        path: str | os.PathLike[str],
        *,
        check_base: bool = True,
        on_progress: Progress | None = None,
    ) -> AdapterValidation:
        """Return what the server would make of an adapter; it registers nothing."""
        return await self._client.send(calls.validate_adapter(Path(path), check_base, on_progress))

    async def versions(self, name: str, *, page_size: int = 100) -> AsyncIterator[Adapter]:
        """Iterate over the versions of a name, newest first."""
        after: int | None = None
        while True:
            page = await self._client.send(calls.list_versions(name, page_size, after))
            for adapter in page.data:
                yield adapter
            if not page.has_more or page.last is None or page.last == after:
                return
            after = page.last

    async def rollback(
        self, name: str, *, version: int | None = None, adapter_id: str | None = None
    ) -> Adapter:
        """Let a name stand for another of its versions, by its number or its id."""
        return await self._client.send(calls.roll_back_adapter(name, version, adapter_id))

    async def change(self, name: str, **settings: Unpack[AdapterSettings]) -> Adapter:
        """Change the given fields of `AdapterSettings`; the others stay as they are."""
        return await self._client.send(calls.change_adapter(name, settings))

    async def pin(self, name: str) -> Adapter:
        """Keep an adapter in the pool once it is there; ConflictError if there is no room."""
        return await self.change(name, pinned=True)

    async def unpin(self, name: str) -> Adapter:
        """Let an adapter leave the pool again."""
        return await self.change(name, pinned=False)

    async def prefetch(self, name: str) -> AdapterPrefetch:
        """Tell the server that requests for an adapter will come soon, or raise NotFoundError."""
        return await self._client.send(calls.prefetch_adapter(name))
