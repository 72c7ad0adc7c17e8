# Written by clients/generate_sync.py from async_resources/generation.py: change that, and run it.
"""Completions, chat and embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack, overload

from loraplex.calls import generation
from loraplex.options import ChatOptions, CompletionOptions, EmbeddingOptions, Messages, Prompt
from loraplex.stream import Stream
from loraplex.types import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    EmbeddingList,
)

if TYPE_CHECKING:
    from loraplex.client import Client


class Completions:
    """Text in, text out."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @overload
    def create(
        self,
        *,
        model: str | None = None,
        prompt: Prompt,
        stream: Literal[False] = False,
        **options: Unpack[CompletionOptions],
    ) -> Completion: ...
    @overload
    def create(
        self,
        *,
        model: str | None = None,
        prompt: Prompt,
        stream: Literal[True],
        **options: Unpack[CompletionOptions],
    ) -> Stream[CompletionChunk]: ...
    def create(
        self,
        *,
        model: str | None = None,
        prompt: Prompt,
        stream: bool = False,
        **options: Unpack[CompletionOptions],
    ) -> Completion | Stream[CompletionChunk]:
        """Continue a prompt: a string, token ids, or a list of either.

        Args:
            model: The base model or an adapter, by name; or give `models`.
            prompt: What to continue.
            stream: Return the pieces as they come.
            options: The fields of `CompletionOptions`.
        """
        if stream:
            return self._client.open_stream(generation.stream_completion(model, prompt, options))
        return self._client.send(generation.create_completion(model, prompt, options))


class Chat:
    """Messages in, a message out."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @overload
    def create(
        self,
        *,
        model: str | None = None,
        messages: Messages,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion: ...
    @overload
    def create(
        self,
        *,
        model: str | None = None,
        messages: Messages,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> Stream[ChatCompletionChunk]: ...
    def create(
        self,
        *,
        model: str | None = None,
        messages: Messages,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion | Stream[ChatCompletionChunk]:
        """Answer a conversation.

        Args:
            model: The base model or an adapter, by name; or give `models`.
            messages: The turns so far: {"role": ..., "content": ...}, or earlier answers' messages.
            stream: Return the pieces as they come.
            options: The fields of `ChatOptions`.
        """
        if stream:
            return self._client.open_stream(generation.stream_chat(model, messages, options))
        return self._client.send(generation.create_chat(model, messages, options))


class Embeddings:
    """Text in, vectors out."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
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
        return self._client.send(generation.create_embeddings(model, input, options))
