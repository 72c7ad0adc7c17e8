"""The operations of `Client`, grouped as their paths are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, overload

from loraplex import calls
from loraplex.adapter_options import AdapterSettings, RegisterOptions
from loraplex.base_client import next_cursor
from loraplex.multipart import Progress
from loraplex.options import ChatOptions, CompletionOptions, Messages, Prompt
from loraplex.stream import Stream
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
        return self._client.send(calls.push_adapter(Path(path), name, on_progress, options))

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

    def delete(
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
        return self._client.send(calls.delete_adapter(name, mode, timeout_s))

    def fetch(
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
        return self._client.send(calls.fetch_adapter(name, source, sha256, options))

    def validate(
        self,
        path: str | os.PathLike[str],
        *,
        check_base: bool = True,
        on_progress: Progress | None = None,
    ) -> AdapterValidation:
        """Return what the server would make of an adapter; it registers nothing."""
        return self._client.send(calls.validate_adapter(Path(path), check_base, on_progress))

    def versions(self, name: str, *, page_size: int = 100) -> Iterator[Adapter]:
        """Iterate over the versions of a name, newest first."""
        after: int | None = None
        while True:
            page = self._client.send(calls.list_versions(name, page_size, after))
            yield from page.data
            if not page.has_more or page.last is None or page.last == after:
                return
            after = page.last

    def rollback(
        self, name: str, *, version: int | None = None, adapter_id: str | None = None
    ) -> Adapter:
        """Let a name stand for another of its versions, by its number or its id."""
        return self._client.send(calls.roll_back_adapter(name, version, adapter_id))

    def change(self, name: str, **settings: Unpack[AdapterSettings]) -> Adapter:
        """Change the given fields of `AdapterSettings`; the others stay as they are."""
        return self._client.send(calls.change_adapter(name, settings))

    def pin(self, name: str) -> Adapter:
        """Keep an adapter in the pool once it is there; ConflictError if there is no room."""
        return self.change(name, pinned=True)

    def unpin(self, name: str) -> Adapter:
        """Let an adapter leave the pool again."""
        return self.change(name, pinned=False)

    def prefetch(self, name: str) -> AdapterPrefetch:
        """Tell the server that requests for an adapter will come soon.

        It answers at once, with where the adapter is now, and brings it nearer as its time and its
        memory allow: a hint, on which nothing may depend.

        Raises:
            NotFoundError: No adapter has this name.
            BadRequestError: It is the base model's.
        """
        return self._client.send(calls.prefetch_adapter(name))
