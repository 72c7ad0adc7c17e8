"""The asynchronous client: sends calls over one `httpx.AsyncClient`, waits between attempts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import httpx

from loraplex.async_resources.accounts import AsyncAudit, AsyncKeys, AsyncUsageLedger
from loraplex.async_resources.adapters import AsyncAdapters
from loraplex.async_resources.generation import AsyncChat, AsyncCompletions, AsyncEmbeddings
from loraplex.async_resources.models import AsyncModels
from loraplex.async_stream import AsyncStream
from loraplex.base_client import (
    DEFAULT_LIMITS,
    DEFAULT_MAX_RETRIES,
    DEFAULT_TIMEOUT,
    BaseClient,
    is_answer,
    missing_openai,
    parse_answer,
    refuse_both,
)
from loraplex.calls import generation, server
from loraplex.calls.call import AnswerT, Call, ItemT, next_page
from loraplex.chunk_reader import ChunkT
from loraplex.options import Messages, TokenizeOptions
from loraplex.types import Health, Metrics, Page, Pool, Tokenized

if TYPE_CHECKING:
    from openai import AsyncOpenAI


class AsyncClient(BaseClient):
    """A connection to a loraplex server: one for a whole program. Close it when done.

    It may be shared as far as `httpx.AsyncClient` may be.
    """

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        max_retries: int = DEFAULT_MAX_RETRIES,
        default_headers: Mapping[str, str] | None = None,
        proxy: str | None = None,
        limits: httpx.Limits = DEFAULT_LIMITS,
        http_client: httpx.AsyncClient | None = None,
    ) -> None:
        """Make a client; nothing is sent yet.

        Args:
            base_url: Of the server; default LORAPLEX_BASE_URL, then http://127.0.0.1:8000.
            api_key: Sent as a bearer token; default LORAPLEX_API_KEY, then none.
            timeout: Seconds or an `httpx.Timeout` of one attempt; None waits for ever.
            max_retries: How many attempts may follow the first (see `loraplex.retry`).
            default_headers: Sent with every request.
            proxy: The URL of what to reach the server through; default: HTTP_PROXY and its like.
            limits: How many connections there may be; by default 1000, of which 20 are kept.
            http_client: For certificates, transports; it stays the caller's to close.

        Raises:
            UsageError: The base URL, the key or the proxy cannot be used.
        """
        refuse_both(http_client, proxy)
        super().__init__(base_url, api_key, timeout, max_retries, default_headers, proxy)
        self._http = http_client or httpx.AsyncClient(proxy=proxy, limits=limits)
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
    def embeddings(self) -> AsyncEmbeddings:
        """POST /v1/embeddings."""
        return AsyncEmbeddings(self)

    @property
    def models(self) -> AsyncModels:
        """The base model and its adapters, as names to put in `model`."""
        return AsyncModels(self)

    @property
    def adapters(self) -> AsyncAdapters:
        """The adapters the server keeps: push, fetch, list, get, change, roll back, delete."""
        return AsyncAdapters(self)

    @property
    def keys(self) -> AsyncKeys:
        """The API keys of a server that has any; for admins."""
        return AsyncKeys(self)

    @property
    def usage(self) -> AsyncUsageLedger:
        """What tenants used of which adapters."""
        return AsyncUsageLedger(self)

    @property
    def audit(self) -> AsyncAudit:
        """Who changed adapters and keys, and when."""
        return AsyncAudit(self)

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        model: str | None = None,
        **options: Unpack[TokenizeOptions],
    ) -> Tokenized:
        """Return the tokens of a text, or of messages as the chat template renders them."""
        return await self.send(generation.tokenize(prompt, messages, model, options))

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """Return the text of tokens."""
        return (await self.send(generation.detokenize(tokens, model))).prompt

    async def pool(self) -> Pool:
        """Return how the pages of the memory pool are used."""
        return await self.send(server.get_pool())

    async def metrics(self) -> Metrics:
        """Return the server's metrics, as Prometheus would scrape them now."""
        return await self.send(server.get_metrics())

    async def health(self) -> Health:
        """Return whether the server can answer; a server that is restarting is no error."""
        return await self.send(server.get_health())

    async def ready(self) -> Health:
        """Return whether the server takes new requests; one that drains, or starts, does not."""
        return await self.send(server.get_ready())

    async def version(self) -> str:
        """Return the server's version."""
        return (await self.send(server.get_version())).version

    def openai(self, **options: Any) -> AsyncOpenAI:
        """Return a client of the `openai` package for the same server, with the same settings.

        Its connections are its own, so it is to be closed by itself, and what an `http_client` does
        for this client it needs another for.

        Args:
            options: Other arguments of `AsyncOpenAI`, such as `http_client`; these are put last.

        Raises:
            UsageError: The package is not installed.
        """
        try:
            import openai
        except ModuleNotFoundError as error:
            raise missing_openai(error) from error
        settings = self._openai_settings(openai.Timeout)
        if self._proxy is not None:
            settings["http_client"] = openai.DefaultAsyncHttpxClient(proxy=self._proxy)
        return openai.AsyncOpenAI(**{**settings, **options})

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

    async def items(self, first: Call[Page[ItemT]]) -> AsyncIterator[ItemT]:
        """Iterate over a list, fetching pages as they are needed. For the resources."""
        call: Call[Page[ItemT]] | None = first
        while call is not None:
            page = await self.send(call)
            for item in page.data:
                yield item
            call = next_page(call, page)

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
