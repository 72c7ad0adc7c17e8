"""The operations of `Client`, grouped as their paths are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, overload

from loraplex import calls
from loraplex.base_client import next_cursor
from loraplex.multipart import Progress
from loraplex.options import ChatOptions, CompletionOptions, Messages, Prompt
from loraplex.stream import Stream
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
    from loraplex.client import Client


class Completions:
    """Text in, text out."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @overload
    def create(
        self,
        *,
        model: str,
        prompt: Prompt,
        stream: Literal[False] = False,
        **options: Unpack[CompletionOptions],
    ) -> Completion: ...
    @overload
    def create(
        self,
        *,
        model: str,
        prompt: Prompt,
        stream: Literal[True],
        **options: Unpack[CompletionOptions],
    ) -> Stream[CompletionChunk]: ...
    def create(
        self,
        *,
        model: str,
        prompt: Prompt,
        stream: bool = False,
        **options: Unpack[CompletionOptions],
    ) -> Completion | Stream[CompletionChunk]:
        """Continue a prompt: a string, token ids, or a list of either.

        Args:
            model: The base model or an adapter, by name.
            prompt: What to continue.
            stream: Return the pieces as they come.
            options: The fields of `CompletionOptions`.
        """
        if stream:
            return self._client.open_stream(calls.stream_completion(model, prompt, options))
        return self._client.send(calls.create_completion(model, prompt, options))


class Chat:
    """Messages in, a message out."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @overload
    def create(
        self,
        *,
        model: str,
        messages: Messages,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion: ...
    @overload
    def create(
        self,
        *,
        model: str,
        messages: Messages,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> Stream[ChatCompletionChunk]: ...
    def create(
        self,
        *,
        model: str,
        messages: Messages,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion | Stream[ChatCompletionChunk]:
        """Answer a conversation.

        Args:
            model: The base model or an adapter, by name.
            messages: The turns so far: {"role": ..., "content": ...}, or earlier answers' messages.
            stream: Return the pieces as they come.
            options: The fields of `ChatOptions`.
        """
        if stream:
            return self._client.open_stream(calls.stream_chat(model, messages, options))
        return self._client.send(calls.create_chat(model, messages, options))


class Models:
    """The names that requests can put in `model`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> list[Model]:
        """Return the base model and every adapter."""
        return self._client.send(calls.list_models()).data

    def retrieve(self, model_id: str) -> Model:
        """Return one of them.

        Raises:
            NotFoundError: No model or adapter has this name.
        """
        return self._client.send(calls.retrieve_model(model_id))


class Adapters:
    """The adapters that the server keeps."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def push(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        check_base: bool = True,
        on_progress: Progress | None = None,
    ) -> Adapter:
        """Upload an adapter. Pushing the same content under the same name again is no error.

        Args:
            path: A PEFT folder, or a .zip, .tar, .tar.gz or .tgz of one.
            name: What requests will call it; default: the folder's or the archive's name.
            check_base: Refuse an adapter whose config names another base than the server's; turn it
                off when that is the same model under another name.
            on_progress: Called with (bytes sent, bytes in total).

        Raises:
            AdapterFilesError: There is no adapter to send at `path`.
            ConflictError: The name holds other content.
            UnprocessableEntityError: The server cannot serve it exactly; `reasons` says why.
        """
        return self._client.send(calls.push_adapter(Path(path), name, check_base, on_progress))

    def list(self, *, page_size: int = 100) -> Iterator[Adapter]:
        """Iterate over every adapter, fetching pages as they are needed."""
        after: str | None = None
        while True:
            page = self._client.send(calls.list_adapters(page_size, after))
            yield from page.data
            after = next_cursor(page, after)
            if after is None:
                return

    def get(self, name: str) -> Adapter:
        """Return one adapter, or raise NotFoundError."""
        return self._client.send(calls.get_adapter(name))

    def delete(self, name: str) -> AdapterDeleted:
        """Forget a name, or raise NotFoundError. Requests that are running finish."""
        return self._client.send(calls.delete_adapter(name))

    def prefetch(self, name: str) -> AdapterPrefetch:
        """Tell the server that requests for an adapter will come soon.

        It answers at once, with where the adapter is now, and brings it nearer as its time and its
        memory allow: a hint, on which nothing may depend.

        Raises:
            NotFoundError: No adapter has this name.
            BadRequestError: It is the base model's.
        """
        return self._client.send(calls.prefetch_adapter(name))
