"""What an exception looks like over HTTP: one table, and the OpenAI shape of every error body."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from loraplex_memory.errors import MemoryAccountError
from loraplex_scheduler.errors import InvalidSampling, RequestRefused
from loraplex_server.adapters import errors as adapters
from loraplex_server.api.envelope import REQUEST_ID_HEADER, REQUEST_ID_KEY
from loraplex_server.api.errors import (
    AdapterDeleted,
    AdapterDraining,
    AdapterMissing,
    ContextLengthExceeded,
    CrossSiteRefused,
    DeadlineExceeded,
    GenerationFailed,
    HeadersTimedOut,
    HeadersTooLarge,
    InvalidApiKey,
    InvalidHttp,
    InvalidRequest,
    InvalidTenant,
    ModelNotFound,
    Overloaded,
    QueueFull,
    QuotaExceeded,
    QuotaTooSmall,
    RequestQuotaExceeded,
    RequestTimedOut,
    RoleRequired,
    ServerStopping,
    TenantForbidden,
    TenantQueueFull,
    TooManyConnections,
    TooManyUploads,
    UploadStalled,
)
from loraplex_server.api.foreign_errors import foreign_error
from loraplex_server.api.json_text import compact
from loraplex_server.engine.errors import EngineConfigError, EngineUnavailable, RankLost
from loraplex_server.model.errors import ModelError
from loraplex_server.tenants import errors as tenants
from loraplex_server.text import errors as text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ErrorShape:
    """How one exception type is answered.

    Attributes:
        is_final: tell clients not to retry, although they retry this status by habit.
        is_internal: the message is for the log, not for the client.
    """

    status: int
    type: str
    code: str
    is_final: bool = False
    is_internal: bool = False


_INVALID: Final = "invalid_request_error"
_LIMIT: Final = "rate_limit_error"
_SERVER: Final = "server_error"
_INTERNAL: Final = ErrorShape(500, _SERVER, "internal_error", is_internal=True)

#: The nearest class in an exception's line of descent decides.
ERROR_TABLE: Final[Mapping[type[Exception], ErrorShape]] = {
    InvalidRequest: ErrorShape(400, _INVALID, "invalid_request"),
    ModelNotFound: ErrorShape(404, _INVALID, "model_not_found"),
    AdapterMissing: ErrorShape(404, _INVALID, "adapter_not_found"),
    ContextLengthExceeded: ErrorShape(400, _INVALID, "context_length_exceeded"),
    InvalidHttp: ErrorShape(400, _INVALID, "invalid_http"),
    HeadersTooLarge: ErrorShape(431, _INVALID, "headers_too_large"),
    HeadersTimedOut: ErrorShape(408, _INVALID, "headers_timeout"),
    TooManyConnections: ErrorShape(503, _SERVER, "too_many_connections"),
    InvalidApiKey: ErrorShape(401, _INVALID, "invalid_api_key"),
    RoleRequired: ErrorShape(403, _INVALID, "role_required"),
    TenantForbidden: ErrorShape(403, _INVALID, "tenant_forbidden"),
    CrossSiteRefused: ErrorShape(403, _INVALID, "cross_site"),
    TooManyUploads: ErrorShape(429, _LIMIT, "too_many_uploads"),
    UploadStalled: ErrorShape(408, _INVALID, "upload_timeout"),
    AdapterDraining: ErrorShape(504, _SERVER, "adapter_draining", is_final=True),
    AdapterDeleted: ErrorShape(409, _INVALID, "adapter_deleted", is_final=True),
    InvalidTenant: ErrorShape(400, _INVALID, "invalid_tenant"),
    QuotaTooSmall: ErrorShape(400, _INVALID, "quota_too_small"),
    QueueFull: ErrorShape(429, _LIMIT, "queue_full"),
    TenantQueueFull: ErrorShape(429, _LIMIT, "tenant_queue_full"),
    QuotaExceeded: ErrorShape(429, _LIMIT, "quota_exceeded"),
    RequestQuotaExceeded: ErrorShape(429, _LIMIT, "request_quota_exceeded"),
    Overloaded: ErrorShape(429, _LIMIT, "overloaded"),
    RequestTimedOut: ErrorShape(504, _SERVER, "request_timeout", is_final=True),
    DeadlineExceeded: ErrorShape(504, _SERVER, "deadline_exceeded", is_final=True),
    ServerStopping: ErrorShape(503, _SERVER, "server_stopping"),
    GenerationFailed: ErrorShape(500, _SERVER, "generation_failed"),
    text.ChatTemplateMissing: ErrorShape(400, _INVALID, "no_chat_template"),
    text.ChatTemplateFailed: ErrorShape(400, _INVALID, "chat_template_failed"),
    text.InvalidGrammar: ErrorShape(400, _INVALID, "invalid_grammar"),
    text.InvalidText: ErrorShape(400, _INVALID, "invalid_text"),
    text.UnknownToken: ErrorShape(400, _INVALID, "unknown_token"),
    InvalidSampling: ErrorShape(400, _INVALID, "invalid_value"),
    RequestRefused: ErrorShape(400, _INVALID, "request_refused"),
    EngineUnavailable: ErrorShape(503, _SERVER, "engine_unavailable"),
    EngineConfigError: _INTERNAL,
    RankLost: _INTERNAL,
    adapters.AdapterNotFound: ErrorShape(404, _INVALID, "adapter_not_found"),
    adapters.AdapterNameTaken: ErrorShape(409, _INVALID, "adapter_name_taken", is_final=True),
    adapters.VersionConflict: ErrorShape(409, _INVALID, "version_conflict", is_final=True),
    adapters.AmbiguousVersion: ErrorShape(400, _INVALID, "ambiguous_version"),
    adapters.VersionIsCurrent: ErrorShape(409, _INVALID, "version_is_current", is_final=True),
    adapters.AdapterNotOwned: ErrorShape(403, _INVALID, "adapter_not_owned"),
    adapters.OwnerHasEnough: ErrorShape(403, _INVALID, "adapter_quota_exceeded"),
    adapters.PinRefused: ErrorShape(409, _INVALID, "pin_refused", is_final=True),
    adapters.SelfTestFailed: ErrorShape(500, _SERVER, "self_test_failed", is_final=True),
    adapters.SourceForbidden: ErrorShape(403, _INVALID, "source_forbidden"),
    adapters.SourceUnsupported: ErrorShape(400, _INVALID, "source_unsupported"),
    adapters.SourceFailed: ErrorShape(502, _SERVER, "source_failed"),
    adapters.DigestMismatch: ErrorShape(422, _INVALID, "digest_mismatch"),
    adapters.InvalidAdapterName: ErrorShape(400, _INVALID, "invalid_adapter_name"),
    adapters.BaseNameTaken: _INTERNAL,  # at start-up only
    adapters.AdapterRefused: ErrorShape(422, _INVALID, "adapter_refused"),
    adapters.InvalidUpload: ErrorShape(400, _INVALID, "invalid_upload"),
    adapters.UploadTooLarge: ErrorShape(413, _INVALID, "upload_too_large"),
    adapters.StorageFailed: ErrorShape(503, _SERVER, "storage_failed"),
    tenants.KeyNotFound: ErrorShape(404, _INVALID, "key_not_found"),
    tenants.InvalidKeyWish: ErrorShape(400, _INVALID, "invalid_key"),
    tenants.InvalidCursor: ErrorShape(400, _INVALID, "invalid_cursor"),
    MemoryAccountError: _INTERNAL,
    ModelError: _INTERNAL,
}

#: What a request can be told that may come again later.
REJECTIONS: Final[tuple[type[Overloaded], ...]] = (
    Overloaded,
    QueueFull,
    TenantQueueFull,
    QuotaExceeded,
    RequestQuotaExceeded,
)

#: Errors of the framework's, and of bodies as they are read.
HTTP_CODES: Final[Mapping[int, str]] = {
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "body_too_large",
}


class ErrorResponse(JSONResponse):
    """JSON in ASCII: a message may quote half a surrogate pair, which UTF-8 cannot write."""

    def render(self, content: Any) -> bytes:
        return compact(content).encode()


def shape_of(kind: type[Exception]) -> ErrorShape:
    """Return how exceptions of this type are answered."""
    for ancestor in kind.__mro__:
        if ancestor in ERROR_TABLE:
            return ERROR_TABLE[ancestor]
    return _INTERNAL


def error_body(error: Exception) -> dict[str, Any]:
    """Return the OpenAI error object, also for an error inside a stream."""
    shape = shape_of(type(error))
    message = "internal error; the server's log has the details" if shape.is_internal else None
    body: dict[str, Any] = {
        "message": message or str(error),
        "type": shape.type,
        "param": getattr(error, "param", None),
        "code": shape.code,
    }
    if isinstance(error, adapters.AdapterRefused):
        body["reasons"] = list(error.reasons)
    body.update(getattr(error, "details", {}))
    if (retry_after_s := _retry_after_s(error)) is not None:
        body["retry_after_s"] = round(retry_after_s, 3)
    return {"error": body}


def _retry_after_s(error: Exception) -> float | None:
    retry_after_s: float | None = getattr(error, "retry_after_s", None)
    return retry_after_s


def error_response(error: Exception, path: str = "") -> ErrorResponse:
    """Return the complete answer to a request on `path` that failed with `error`."""
    shape = shape_of(type(error))
    headers = {}
    if (retry_after_s := _retry_after_s(error)) is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        # OpenAI's client and ours read this one first; it knows fractions of a second.
        headers["retry-after-ms"] = str(max(1, math.ceil(retry_after_s * 1000)))
    if shape.is_final:
        headers["x-should-retry"] = "false"
    if shape.status == 401:
        headers["www-authenticate"] = "Bearer"
    status, body = foreign_error(path, shape.status, error_body(error)["error"])
    return ErrorResponse(body, status_code=status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception of the table, and every other one, in the OpenAI shape."""
    for kind in ERROR_TABLE:
        app.add_exception_handler(kind, _handle)
    app.add_exception_handler(RequestValidationError, _handle_validation)
    app.add_exception_handler(HTTPException, _handle_http)
    app.add_exception_handler(RecursionError, _handle_recursion)
    app.add_exception_handler(Exception, _handle_unexpected)


async def _handle(request: Request, error: Exception) -> ErrorResponse:
    if shape_of(type(error)).is_internal:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(error, request.url.path)


async def _handle_recursion(request: Request, error: Exception) -> ErrorResponse:
    """Python's parsers take JSON that is deeper than what else walks through it."""
    log.warning("%s %s: %s", request.method, request.url.path, error)
    problem = InvalidRequest("the body is nested too deeply")
    return error_response(problem, request.url.path)


async def _handle_unexpected(request: Request, error: Exception) -> ErrorResponse:
    """Answer outside of all middleware; the server logs the traceback."""
    response = error_response(error, request.url.path)
    response.headers[REQUEST_ID_HEADER] = str(request.scope.get(REQUEST_ID_KEY, ""))
    return response


async def _handle_http(request: Request, error: Exception) -> ErrorResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    shown = {
        "message": message,
        "type": _INVALID if error.status_code < 500 else _SERVER,
        "param": None,
        "code": HTTP_CODES.get(error.status_code, "invalid_request"),
    }
    status, body = foreign_error(request.url.path, error.status_code, shown)
    return ErrorResponse(body, status_code=status, headers=error.headers)


async def _handle_validation(request: Request, error: Exception) -> ErrorResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    problem = _explain(first, request.headers.get("content-type"))
    return error_response(problem, request.url.path)


def _explain(problem: Mapping[str, Any], content_type: str | None) -> InvalidRequest:
    """Say in one sentence what pydantic found wrong first, naming the field."""
    location = list(problem["loc"])
    kind = str(problem["type"])
    if kind == "json_invalid":
        reason = problem["ctx"]["error"]
        return InvalidRequest(f"the body is not valid JSON: {reason} at byte {location[-1]}")
    # A check of a whole object names one of its fields.
    field = problem.get("ctx", {}).get("param")
    param = _path([*location[1:], field] if field else location[1:])
    if not param:
        if kind == "missing":
            return InvalidRequest("the body is empty; send a JSON object")
        if "json" not in (content_type or ""):
            return InvalidRequest(
                f"content-type must be application/json, not {content_type or 'missing'}"
            )
        return InvalidRequest("the body must be a JSON object")
    if kind == "extra_forbidden":
        return InvalidRequest(f"unknown field `{param}`", param=param)
    if kind == "missing":
        return InvalidRequest(f"`{param}` is required", param=param)
    message = str(problem["msg"]).removeprefix("Value error, ")
    return InvalidRequest(f"`{param}`: {message}", param=param)


def _path(location: list[Any]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")
