"""The operations of `AsyncClient`; `loraplex.resources` says more about each."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, overload

from loraplex import calls
from loraplex.base_client import next_cursor
from loraplex.multipart import Progress
from loraplex.options import ChatOptions, CompletionOptions, Messages, Prompt
from loraplex.stream import AsyncStream
from loraplex.types import (
    Adapter,
    AdapterDeleted,
    AdapterPrefetch,
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
        check_base: bool = True,
        on_progress: Progress | None = None,
    ) -> Adapter:
        """Upload an adapter. Pushing the same content under the same name again is no error."""
        return await self._client.send(
            calls.push_adapter(Path(path), name, check_base, on_progress)
        )

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

    async def delete(self, name: str) -> AdapterDeleted:
        """Forget a name, or raise NotFoundError. Requests that are running finish."""
        return await self._client.send(calls.delete_adapter(name))

    async def prefetch(self, name: str) -> AdapterPrefetch:
        """Tell the server that requests for an adapter will come soon, or raise NotFoundError."""
        return await self._client.send(calls.prefetch_adapter(name))
