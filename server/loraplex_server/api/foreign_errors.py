"""Error bodies as other servers' clients expect them, on the paths that those clients call.

Everything else is in OpenAI's shape (`errors`). A body is rewritten at the last moment, so that
whatever can go wrong on such a path, from bad JSON to a full queue, is told in one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

#: From status and OpenAI's error object to status and body.
Rewrite = Callable[[int, dict[str, Any]], tuple[int, dict[str, Any]]]

_VLLM_TYPES: Final[Mapping[int, str]] = {
    400: "InvalidUserInput",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    422: "UnprocessableEntityError",
    429: "TooManyRequestsError",
    503: "ServiceUnavailableError",
}


def _vllm(status: int, error: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """`code` is the status; never 409, which OpenAI's client would try again by itself."""
    status = 400 if status == 409 else status
    usual = "InternalServerError" if status >= 500 else "BadRequestError"
    changed = {"type": _VLLM_TYPES.get(status, usual), "code": status}
    return status, {"error": {**error, **changed}}


def _sglang(status: int, error: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The list of what is loaded comes with success only."""
    reasons = {"reasons": error["reasons"]} if "reasons" in error else {}
    message = {"success": False, "error_message": error["message"], "loaded_adapters": None}
    return (400 if status < 500 and status != 429 else status), {**message, **reasons}


def _lorax(status: int, error: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A request that cannot be served is 422 there; `error_type` decides what clients raise."""
    if status == 429:
        kind = "overloaded"
    else:
        kind = "validation" if status < 500 else "generation"
    return (422 if status == 400 else status), {"error": error["message"], "error_type": kind}


_ANTHROPIC_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _anthropic(status: int, error: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """`code` and `param` stay, for people; the type is all that clients read."""
    usual = "api_error" if status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_TYPES.get(status, usual)
    return status, {"type": "error", "error": {**error, "type": kind}}


_REWRITES: Final[Mapping[str, Rewrite]] = {
    "/v1/load_lora_adapter": _vllm,
    "/v1/unload_lora_adapter": _vllm,
    "/load_lora_adapter": _sglang,
    "/unload_lora_adapter": _sglang,
    "/v1/messages": _anthropic,
    "/v1/messages/count_tokens": _anthropic,
    "/generate": _lorax,
    "/generate_stream": _lorax,
}


def foreign_error(path: str, status: int, error: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return status and body of an error on `path`.

    Args:
        error: as it is in OpenAI's shape, inside of `{"error": ...}`.
    """
    rewrite = _REWRITES.get(path)
    return rewrite(status, error) if rewrite else (status, {"error": error})
