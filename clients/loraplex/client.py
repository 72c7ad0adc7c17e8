# Written by clients/generate_sync.py from async_client.py: change that, and run it.
"""The synchronous client: sends calls over one `httpx.Client`, waits between attempts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import httpx

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
from loraplex.resources.accounts import Audit, Keys, UsageLedger
from loraplex.resources.adapters import Adapters
from loraplex.resources.generation import Chat, Completions, Embeddings
from loraplex.resources.models import Models
from loraplex.stream import Stream
from loraplex.types import Health, Metrics, Page, Pool, Tokenized

if TYPE_CHECKING:
    from openai import OpenAI


class Client(BaseClient):
    """A connection to a loraplex server: one for a whole program. Close it when done.

    It may be shared as far as `httpx.Client` may be.
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
        http_client: httpx.Client | None = None,
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
        self._http = http_client or httpx.Client(proxy=proxy, limits=limits)
        self._owns_http = http_client is None

    @property
    def completions(self) -> Completions:
        """POST /v1/completions."""
        return Completions(self)

    @property
    def chat(self) -> Chat:
        """POST /v1/chat/completions."""
        return Chat(self)

    @property
    def embeddings(self) -> Embeddings:
        """POST /v1/embeddings."""
        return Embeddings(self)

    @property
    def models(self) -> Models:
        """The base model and its adapters, as names to put in `model`."""
        return Models(self)

    @property
    def adapters(self) -> Adapters:
        """The adapters the server keeps: push, fetch, list, get, change, roll back, delete."""
        return Adapters(self)

    @property
    def keys(self) -> Keys:
        """The API keys of a server that has any; for admins."""
        return Keys(self)

    @property
    def usage(self) -> UsageLedger:
        """What tenants used of which adapters."""
        return UsageLedger(self)

    @property
    def audit(self) -> Audit:
        """Who changed adapters and keys, and when."""
        return Audit(self)

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        model: str | None = None,
        **options: Unpack[TokenizeOptions],
    ) -> Tokenized:
        """Return the tokens of a text, or of messages as the chat template renders them."""
        return self.send(generation.tokenize(prompt, messages, model, options))

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """Return the text of tokens."""
        return (self.send(generation.detokenize(tokens, model))).prompt

    def pool(self) -> Pool:
        """Return how the pages of the memory pool are used."""
        return self.send(server.get_pool())

    def metrics(self) -> Metrics:
        """Return the server's metrics, as Prometheus would scrape them now."""
        return self.send(server.get_metrics())

    def health(self) -> Health:
        """Return whether the server can answer; a server that is restarting is no error."""
        return self.send(server.get_health())

    def ready(self) -> Health:
        """Return whether the server takes new requests; one that drains, or starts, does not."""
        return self.send(server.get_ready())

    def version(self) -> str:
        """Return the server's version."""
        return (self.send(server.get_version())).version

    def openai(self, **options: Any) -> OpenAI:
        """Return a client of the `openai` package for the same server, with the same settings.

        Its connections are its own, so it is to be closed by itself, and what an `http_client` does
        for this client it needs another for.

        Args:
            options: Other arguments of `OpenAI`, such as `http_client`; these are put last.

        Raises:
            UsageError: The package is not installed.
        """
        try:
            import openai
        except ModuleNotFoundError as error:
            raise missing_openai(error) from error
        settings = self._openai_settings(openai.Timeout)
        if self._proxy is not None:
            settings["http_client"] = openai.DefaultHttpxClient(proxy=self._proxy)
        return openai.OpenAI(**{**settings, **options})

    def close(self) -> None:
        """Close the connections, unless they are the caller's."""
        if self._owns_http:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def send(self, call: Call[AnswerT]) -> AnswerT:
        """Send a call and read its whole answer. For the resources; applications use those."""
        return parse_answer(call, self._open(call))

    def items(self, first: Call[Page[ItemT]]) -> Iterator[ItemT]:
        """Iterate over a list, fetching pages as they are needed. For the resources."""
        call: Call[Page[ItemT]] | None = first
        while call is not None:
            page = self.send(call)
            yield from page.data
            call = next_page(call, page)

    def open_stream(self, call: Call[ChunkT]) -> Stream[ChunkT]:
        """Send a call and return its stream. For the resources."""
        return Stream(self._open(call), call.answer_type)

    def _open(self, call: Call[AnswerT]) -> httpx.Response:
        """Send a call until it is answered; the body of a stream is left to be read."""
        for attempt in itertools.count():
            try:
                response = self._http.send(self._request(call), stream=call.is_stream)
                if is_answer(call, response):
                    return response
                response.read()
                delay_s = self._delay_or_raise(call, attempt, response)
            except httpx.RequestError as error:
                delay_s = self._delay_or_raise(call, attempt, error)
            time.sleep(delay_s)
        raise AssertionError  # count() has no end

    def _request(self, call: Call[AnswerT]) -> httpx.Request:
        content = call.upload.stream() if call.upload else None
        return self._http.build_request(**self._request_arguments(call), content=content)
