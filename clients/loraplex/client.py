"""The synchronous client: sends calls over one `httpx.Client` and waits between attempts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import httpx

from loraplex import calls
from loraplex.base_client import (
    DEFAULT_MAX_RETRIES,
    DEFAULT_TIMEOUT,
    BaseClient,
    is_answer,
    parse_answer,
)
from loraplex.calls import AnswerT, Call
from loraplex.resources import Adapters, Chat, Completions, Models
from loraplex.stream import ChunkT, Stream
from loraplex.types import Health, Pool


class Client(BaseClient):
    """A connection to a loraplex server. Safe to share between threads; close it when done."""

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        max_retries: int = DEFAULT_MAX_RETRIES,
        default_headers: Mapping[str, str] | None = None,
        http_client: httpx.Client | None = None,
    ) -> None:
        """Make a client; nothing is sent yet.

        Args:
            base_url: Of the server; default LORAPLEX_BASE_URL, then http://127.0.0.1:8000.
            api_key: Sent as a bearer token; default LORAPLEX_API_KEY, then none.
            timeout: Seconds or an `httpx.Timeout` of one attempt; None waits for ever.
            max_retries: How many attempts may follow the first (see `loraplex.retry`).
            default_headers: Sent with every request.
            http_client: For proxies, certificates, transports; it stays the caller's to close.

        Raises:
            UsageError: The base URL or the key cannot be used.
        """
        super().__init__(base_url, api_key, timeout, max_retries, default_headers)
        self._http = http_client or httpx.Client()
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
    def models(self) -> Models:
        """The base model and its adapters, as names to put in `model`."""
        return Models(self)

    @property
    def adapters(self) -> Adapters:
        """The adapters the server keeps: push, fetch, list, get, change, roll back, delete."""
        return Adapters(self)

    def pool(self) -> Pool:
        """Return how the pages of the memory pool are used."""
        return self.send(calls.get_pool())

    def health(self) -> Health:
        """Return whether the server can answer; a server that is restarting is no error."""
        return self.send(calls.get_health())

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
