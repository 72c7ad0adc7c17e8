"""Completions, chat and embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack, overload

from loraplex.async_stream import AsyncStream
from loraplex.calls import generation
from loraplex.options import ChatOptions, CompletionOptions, EmbeddingOptions, Messages, Prompt
from loraplex.types import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    EmbeddingList,
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
        model: str | None = None,
        prompt: Prompt,
        stream: Literal[False] = False,
        **options: Unpack[CompletionOptions],
    ) -> Completion: ...
    @overload
    async def create(
        self,
        *,
        model: str | None = None,
        prompt: Prompt,
        stream: Literal[True],
        **options: Unpack[CompletionOptions],
    ) -> AsyncStream[CompletionChunk]: ...
    async def create(
        self,
        *,
        model: str | None = None,
        prompt: Prompt,
        stream: bool = False,
        **options: Unpack[CompletionOptions],
    ) -> Completion | AsyncStream[CompletionChunk]:
        """Continue a prompt: a string, token ids, or a list of either.

        Args:
            model: The base model or an adapter, by name; or give `models`.
            prompt: What to continue.
            stream: Return the pieces as they come.
            options: The fields of `CompletionOptions`.
        """
        if stream:
            return await self._client.open_stream(
                generation.stream_completion(model, prompt, options)
            )
        return await self._client.send(generation.create_completion(model, prompt, options))


class AsyncChat:
    """Messages in, a message out."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @overload
    async def create(
        self,
        *,
        model: str | None = None,
        messages: Messages,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion: ...
    @overload
    async def create(
        self,
        *,
        model: str | None = None,
        messages: Messages,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> AsyncStream[ChatCompletionChunk]: ...
    async def create(
        self,
        *,
        model: str | None = None,
        messages: Messages,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]:
        """Answer a conversation.

        Args:
            model: The base model or an adapter, by name; or give `models`.
            messages: The turns so far: {"role": ..., "content": ...}, or earlier answers' messages.
            stream: Return the pieces as they come.
            options: The fields of `ChatOptions`.
        """
        if stream:
            return await self._client.open_stream(generation.stream_chat(model, messages, options))
        return await self._client.send(generation.create_chat(model, messages, options))


class AsyncEmbeddings:
    """Text in, vectors out."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(
        self,
        *,
        model: str,
        input: Prompt,  # noqa: A002 - OpenAI's name
        **options: Unpack[EmbeddingOptions],
    ) -> EmbeddingList:
        """Return a vector for each input: its hidden states, pooled.

        Args:
            model: The base model or an adapter, by name.
            input: A string, token ids, or a list of either.
            options: The fields of `EmbeddingOptions`.
        """
        return await self._client.send(generation.create_embeddings(model, input, options))
