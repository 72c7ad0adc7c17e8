"""What the sync and the async client share: settings, requests, errors. No I/O happens here."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from copy import copy
from datetime import UTC, datetime
from typing import Any, Final, Self

import httpx

from loraplex.calls.call import AnswerT, Call
from loraplex.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    InvalidResponseError,
    UsageError,
    error_type,
    parse_error_body,
)
from loraplex.retry import Failure, parse_retry_after_s, parse_should_retry, retry_delay_s
from loraplex.version import installed_version

DEFAULT_BASE_URL: Final = "http://127.0.0.1:8000"
# Connecting is quick or hopeless; a long answer that is not streamed takes minutes.
DEFAULT_TIMEOUT: Final = httpx.Timeout(600.0, connect=5.0)
DEFAULT_MAX_RETRIES: Final = 2
# httpx's own 100 would hold back programs that ask a lot at once, without a word.
DEFAULT_LIMITS: Final = httpx.Limits(max_connections=1000, max_keepalive_connections=20)

_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class BaseClient:
    """Settings of a client, and every decision about a request that needs no network.

    Attributes:
        base_url: Of the server, without "/v1" and without a slash at the end.
        timeout: Of one attempt.
        max_retries: How many attempts may follow the first.
    """

    def __init__(
        self,
        base_url: str | None,
        api_key: str | None,
        timeout: float | httpx.Timeout | None,
        max_retries: int,
        default_headers: Mapping[str, str] | None,
        proxy: str | None,
    ) -> None:
        self.base_url = _server_root(
            base_url or os.environ.get("LORAPLEX_BASE_URL") or DEFAULT_BASE_URL
        )
        api_key = api_key or os.environ.get("LORAPLEX_API_KEY")
        self._api_key = _checked_key(api_key) if api_key else None
        self.timeout = timeout
        self.max_retries = max_retries
        self._proxy = proxy
        self._headers = {"User-Agent": f"loraplex-python/{installed_version()}"}
        if self._api_key:
            self._headers["Authorization"] = f"Bearer {self._api_key}"
        self._headers.update(default_headers or {})
        self._owns_http = False

    def with_options(
        self,
        *,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        max_retries: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Self:
        """Return a client with other settings over the same connections.

        Closing it closes nothing: the connections belong to the client it was made from.

        Args:
            timeout: Seconds or an `httpx.Timeout` of one attempt; None waits for ever.
            max_retries: How many attempts may follow the first.
            headers: Sent besides those of the original client.
        """
        other = copy(self)
        other._owns_http = False
        if timeout is not DEFAULT_TIMEOUT:
            other.timeout = timeout
        if max_retries is not None:
            other.max_retries = max_retries
        other._headers = {**self._headers, **(headers or {})}
        return other

    def _request_arguments(self, call: Call[Any]) -> dict[str, Any]:
        """Return the arguments of `build_request` on either httpx client, except an upload."""
        return {
            "method": call.method,
            "url": f"{self.base_url}{call.path}",
            "params": call.params,
            "json": call.json,
            "headers": {**call.headers, **self._headers},
            "timeout": self.timeout,
        }

    def _openai_settings(self, timeout_type: type[Any]) -> dict[str, Any]:
        """Return the arguments of either client of the `openai` package, except the transport.

        Args:
            timeout_type: That package's `Timeout`, which need not be that of our httpx.
        """
        of_itself = ("User-Agent", "Authorization")
        timeout = self.timeout
        if isinstance(timeout, httpx.Timeout):
            timeout = timeout_type(**timeout.as_dict())
        return {
            "base_url": f"{self.base_url}/v1",
            # It insists on a key, of which a server without keys takes no notice.
            "api_key": self._api_key or "none",
            "timeout": timeout,
            "max_retries": self.max_retries,
            "default_headers": {k: v for k, v in self._headers.items() if k not in of_itself},
        }

    def _delay_or_raise(
        self, call: Call[Any], attempt: int, outcome: httpx.Response | httpx.RequestError
    ) -> float:
        """Return the seconds to wait before the next attempt, or raise what this one came to."""
        failure = _failure(outcome)
        delay_s = retry_delay_s(
            failure,
            attempt=attempt,
            max_retries=0 if call.answer_statuses else self.max_retries,
            is_repeatable=call.is_repeatable,
            jitter=random.random(),
        )
        if delay_s is not None:
            return delay_s
        if isinstance(outcome, httpx.Response):
            raise _status_error(outcome, failure.retry_after_s)
        raise _connection_error(outcome, f"{self.base_url}{call.path}") from outcome


def refuse_both(http_client: object, proxy: object) -> None:
    """Refuse a proxy beside a whole httpx client, which has its own or none."""
    if http_client is not None and proxy is not None:
        raise UsageError("give the proxy to your own http_client: httpx.Client(proxy=...)")


def missing_openai(error: ModuleNotFoundError) -> UsageError:
    """Return what to do about an `openai` package that is not there."""
    return UsageError(f"client.openai() needs the openai package ({error}): pip install openai")


def is_answer(call: Call[Any], response: httpx.Response) -> bool:
    """Return whether a response carries the call's answer, and not an error."""
    return response.is_success or response.status_code in call.answer_statuses


def parse_answer(call: Call[AnswerT], response: httpx.Response) -> AnswerT:
    """Read a whole response.

    Raises:
        InvalidResponseError: The body is not what the contract says.
    """
    try:
        return call.answer_type.from_body(response.content)
    except ValueError as error:
        what = f"{call.method} {response.url} (status {response.status_code})"
        raise InvalidResponseError(
            f"{what} did not answer as a loraplex server does; is the base URL right? {error}"
        ) from error


def _failure(outcome: httpx.Response | httpx.RequestError) -> Failure:
    if isinstance(outcome, httpx.Response):
        retry_after_s = parse_retry_after_s(outcome.headers, datetime.now(UTC))
        return Failure(
            outcome.status_code,
            retry_after_s=retry_after_s,
            should_retry=parse_should_retry(outcome.headers),
        )
    return Failure(
        was_sent=not isinstance(outcome, _UNSENT),
        is_timeout=isinstance(outcome, httpx.TimeoutException),
    )


def _status_error(response: httpx.Response, retry_after_s: float | None) -> APIStatusError:
    fallback = f"HTTP {response.status_code} {response.reason_phrase}".rstrip()
    return error_type(response.status_code)(
        response.status_code,
        parse_error_body(response.content, fallback=fallback),
        response.headers.get("x-request-id"),
        retry_after_s,
    )


def _connection_error(error: httpx.RequestError, url: str) -> APIConnectionError:
    if isinstance(error, httpx.TimeoutException):
        return APITimeoutError(url, "timed out")
    was_connected = not isinstance(error, _UNSENT)
    return APIConnectionError(url, str(error) or type(error).__name__, was_connected)


def _server_root(base_url: str) -> str:
    """Accept what people copy from an OpenAI client's settings too: ".../v1/"."""
    root = base_url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        url = httpx.URL(root)
    except httpx.InvalidURL as error:
        raise UsageError(f"the base URL {base_url!r} is not a URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"the base URL {base_url!r} does not start with http:// and a host")
    return root


def _checked_key(api_key: str) -> str:
    """Refuse a key that no header can carry, without repeating it."""
    api_key = api_key.strip()
    if not api_key.isascii() or not api_key.isprintable():
        raise UsageError("the API key holds characters that a key cannot have")
    return api_key
