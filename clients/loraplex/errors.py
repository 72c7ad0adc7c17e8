"""Every error the SDK raises, and the one table from HTTP status to exception.

    LoraplexError
    ├── UsageError                  an argument or a setting that cannot be used (a ValueError too)
    ├── AdapterFilesError           what `adapters.push` was given is not an adapter to send
    ├── APIConnectionError          no answer: refused, unreachable, cut off
    │   └── APITimeoutError         no answer in time
    ├── APIStatusError              an answer, and it is an error
    │   ├── BadRequestError             400
    │   ├── AuthenticationError         401
    │   ├── PermissionDeniedError       403
    │   ├── NotFoundError               404
    │   ├── ConflictError               409
    │   ├── PayloadTooLargeError        413
    │   ├── UnprocessableEntityError    422 (a refused adapter: see `reasons`)
    │   ├── RateLimitError              429
    │   └── InternalServerError         500 and above
    ├── StreamError                 a stream that had begun broke off, for any reason
    └── InvalidResponseError        a success whose body is not what the contract says

The `APIStatusError` names and attributes are those of the `openai` package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class LoraplexError(Exception):
    """Base of every error raised by this package."""


class UsageError(LoraplexError, ValueError):
    """An argument or a setting that cannot be used, found before anything was sent."""


class AdapterFilesError(LoraplexError):
    """The path given to `adapters.push` holds no adapter that can be sent.

    Attributes:
        path: The folder or archive.
        problem: What is wrong with it and what to do, without the path.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class APIConnectionError(LoraplexError):
    """The server could not be reached, or the connection broke before it answered.

    Attributes:
        url: What was asked.
        problem: What the transport said.
        was_connected: There was a server, and the connection to it broke.
    """

    def __init__(self, url: str, problem: str, was_connected: bool = False) -> None:
        super().__init__(url, problem, was_connected)
        self.url = url
        self.problem = problem
        self.was_connected = was_connected

    def __str__(self) -> str:
        return f"no answer from {self.url}: {self.problem}"


class APITimeoutError(APIConnectionError):
    """The server did not answer within the timeout."""


@dataclass(frozen=True)
class ErrorDetail:
    """The error object of a response body or of a stream event.

    Attributes:
        message: For people; never empty.
        type: The family of the error, as OpenAI names them.
        param: The request field at fault.
        code: The exact error, for programs.
        reasons: Everything that was found wrong with an adapter.
        retry_after_s: Seconds the server asked to wait.
        body: The decoded JSON, or the text when it was not JSON.
    """

    message: str
    type: str | None = None
    param: str | None = None
    code: str | None = None
    reasons: tuple[str, ...] = ()
    body: Any = None
    retry_after_s: float | None = None

    def __str__(self) -> str:
        unsaid = [reason for reason in self.reasons if reason not in self.message]
        return f"{self.message.rstrip(':. ')}: {'; '.join(unsaid)}" if unsaid else self.message


class APIStatusError(LoraplexError):
    """The server answered with an error status. `detail`'s fields are attributes too.

    Attributes:
        status_code: The HTTP status.
        request_id: The `x-request-id` of the response, to be quoted to whoever runs the server.
        retry_after_s: Seconds the server asked to wait.
    """

    def __init__(
        self,
        status_code: int,
        detail: ErrorDetail,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(status_code, detail, request_id, retry_after_s)
        self.status_code = status_code
        self.detail = detail
        self.message = detail.message
        self.type = detail.type
        self.param = detail.param
        self.code = detail.code
        self.reasons = detail.reasons
        self.body = detail.body
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.detail)


class BadRequestError(APIStatusError):
    """400: the request is malformed or asks for something impossible."""


class AuthenticationError(APIStatusError):
    """401: no API key, or one that the server does not know."""


class PermissionDeniedError(APIStatusError):
    """403: the API key does not allow this."""


class NotFoundError(APIStatusError):
    """404: no such model, adapter or path."""


class ConflictError(APIStatusError):
    """409: the adapter name already holds other content."""


class PayloadTooLargeError(APIStatusError):
    """413: the upload is larger than the server takes."""


class UnprocessableEntityError(APIStatusError):
    """422: an adapter that cannot be served exactly; `reasons` lists everything found."""


class RateLimitError(APIStatusError):
    """429: too much for now; `retry_after_s` says when to come back.

    `code` says why: `overloaded` (the first token would have come too late), `queue_full`,
    `tenant_queue_full`, `quota_exceeded` or `too_many_uploads`.
    """


class InternalServerError(APIStatusError):
    """500 and above: the server failed, or is (re)starting (503)."""


class StreamError(LoraplexError):
    """A stream that had begun broke off: what was received so far is not the whole answer.

    `code` is the server's, or `connection_lost`, `timeout`, `incomplete` (the stream ended
    without its `[DONE]`) or `invalid_chunk`. `retry_after_s` is set where the server said when to
    try again.
    """

    def __init__(self, detail: ErrorDetail) -> None:
        super().__init__(detail)
        self.detail = detail
        self.message = detail.message
        self.type = detail.type
        self.param = detail.param
        self.code = detail.code
        self.body = detail.body
        self.retry_after_s = detail.retry_after_s

    def __str__(self) -> str:
        return str(self.detail)


class InvalidResponseError(LoraplexError):
    """A success status with a body that this SDK cannot read."""


ERROR_OF_STATUS: Mapping[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
    422: UnprocessableEntityError,
    429: RateLimitError,
}


def error_type(status_code: int) -> type[APIStatusError]:
    """Return the exception class of an HTTP status."""
    if status_code >= 500:
        return InternalServerError
    return ERROR_OF_STATUS.get(status_code, APIStatusError)


def parse_error_body(content: bytes, *, fallback: str) -> ErrorDetail:
    """Read an error body: ours (nested), SGLang's (flat), FastAPI's, or a proxy's page.

    Args:
        content: The body as received.
        fallback: The message when the body holds none.
    """
    text = content.decode("utf-8", errors="replace").strip()
    try:
        body = json.loads(text)
    except ValueError:
        return ErrorDetail(f"{fallback}: {text[:200]}" if text else fallback, body=text)
    return detail_from_json(body, fallback=fallback)


def detail_from_json(body: Any, *, fallback: str) -> ErrorDetail:
    """Read a decoded error body; see `parse_error_body`."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    if not isinstance(error, Mapping):
        return ErrorDetail(error if isinstance(error, str) and error else fallback, body=body)
    reasons, retry_after_s = error.get("reasons"), error.get("retry_after_s")
    return ErrorDetail(
        message=_text(error.get("message")) or _text(error.get("detail")) or fallback,
        type=_text(error.get("type")),
        param=_text(error.get("param")),
        code=_text(error.get("code")),
        reasons=tuple(str(reason) for reason in reasons) if isinstance(reasons, list) else (),
        body=body,
        retry_after_s=retry_after_s if isinstance(retry_after_s, int | float) else None,
    )


def _text(value: Any) -> str | None:
    """Some servers put numbers, lists or null where OpenAI puts strings."""
    return None if value is None or value == "" else str(value)
