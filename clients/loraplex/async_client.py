"""The asynchronous client: sends calls over one `httpx.AsyncClient`, on asyncio."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import httpx

from loraplex import calls
from loraplex.async_resources import AsyncAdapters, AsyncChat, AsyncCompletions, AsyncModels
from loraplex.base_client import (
    DEFAULT_MAX_RETRIES,
    DEFAULT_TIMEOUT,
    BaseClient,
    is_answer,
    parse_answer,
)
from loraplex.calls import AnswerT, Call
from loraplex.stream import AsyncStream, ChunkT
from loraplex.types import Health, Pool


class AsyncClient(BaseClient):
    """A connection to a loraplex server. Owned by one event loop; close it when done."""

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        max_retries: int = DEFAULT_MAX_RETRIES,
        default_headers: Mapping[str, str] | None = None,
        http_client: httpx.AsyncClient | None = None,
    ) -> None:
        """Make a client; nothing is sent yet. The arguments are those of `Client`."""
        super().__init__(base_url, api_key, timeout, max_retries, default_headers)
        self._http = http_client or httpx.AsyncClient()
        self._owns_http = http_client is None

    @property
    def completions(self) -> AsyncCompletions:
        """POST /v1/completions."""
        return AsyncCompletions(self)

    @property
    def chat(self) -> AsyncChat:
        """POST /v1/chat/completions."""
        return AsyncChat(self)

    @property
    def models(self) -> AsyncModels:
        """The base model and its adapters, as names to put in `model`."""
        return AsyncModels(self)

    @property
    def adapters(self) -> AsyncAdapters:
        """The adapters the server keeps: push, fetch, list, get, change, roll back, delete."""
        return AsyncAdapters(self)

    async def pool(self) -> Pool:
        """Return how the pages of the memory pool are used."""
        return await self.send(calls.get_pool())

    async def health(self) -> Health:
        """Return whether the server can answer; a server that is restarting is no error."""
        return await self.send(calls.get_health())

    async def close(self) -> None:
        """Close the connections, unless they are the caller's."""
        if self._owns_http:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def send(self, call: Call[AnswerT]) -> AnswerT:
        """Send a call and read its whole answer. For the resources; applications use those."""
        return parse_answer(call, await self._open(call))

    async def open_stream(self, call: Call[ChunkT]) -> AsyncStream[ChunkT]:
        """Send a call and return its stream. For the resources."""
        return AsyncStream(await self._open(call), call.answer_type)

    async def _open(self, call: Call[AnswerT]) -> httpx.Response:
        """Send a call until it is answered; the body of a stream is left to be read."""
        for attempt in itertools.count():
            try:
                response = await self._http.send(self._request(call), stream=call.is_stream)
                if is_answer(call, response):
                    return response
                await response.aread()
                delay_s = self._delay_or_raise(call, attempt, response)
            except httpx.RequestError as error:
                delay_s = self._delay_or_raise(call, attempt, error)
            await asyncio.sleep(delay_s)
        raise AssertionError  # count() has no end

    def _request(self, call: Call[AnswerT]) -> httpx.Request:
        content = call.upload.astream() if call.upload else None
        return self._http.build_request(**self._request_arguments(call), content=content)
