"""What to do about each error, in one line; the reasons of a refusal are listed under it."""

from __future__ import annotations

import math
from urllib.parse import urlsplit

from loraplex.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    InternalServerError,
    LoraplexError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    UnprocessableEntityError,
)

_ADVICE: dict[type[LoraplexError], str] = {
    AuthenticationError: "give a key with --api-key or LORAPLEX_API_KEY",
    PermissionDeniedError: "use a key that allows this (--api-key or LORAPLEX_API_KEY)",
    NotFoundError: "`loraplex models` lists what the server knows",
    PayloadTooLargeError: "push a smaller adapter, or raise the server's upload limit",
    UnprocessableEntityError: "nothing was kept; correct it and push it again",
    RateLimitError: "wait a little and try again",
    InternalServerError: "try again, and look at the server's log",
}

#: Where the status says too little; "" where the server's message says all there is to do.
_ADVICE_BY_CODE = {
    "not_found": "the server has no such call; `loraplex doctor` compares its version with this",
    "adapter_name_taken": "--replace makes it a new version, `loraplex adapters rm` frees the name",
    "version_conflict": "`loraplex adapters versions NAME` shows what there is",
    "source_forbidden": "",
    "source_failed": "",
    "adapter_draining": "",
    "self_test_failed": "",
    "role_required": "",
}

_WAITING = (InternalServerError, RateLimitError)


def explain(error: LoraplexError) -> str:
    """Return what happened and what to do next."""
    if isinstance(error, APIConnectionError):
        return _unreachable(error)
    reasons = list(error.reasons) if isinstance(error, APIStatusError) else []
    if len(reasons) < 2:
        return _line(error, str(error))
    told = f"{error}".replace("; ".join(reasons), "").rstrip(": ")
    bullets = [f"  - {' '.join(reason.split())}" for reason in reasons]
    return "\n".join([_line(error, told), *bullets])


def _line(error: LoraplexError, told: str) -> str:
    parts = [" ".join(told.split()).rstrip(".")]
    if isinstance(error, _WAITING) and error.retry_after_s is not None:
        parts.append(f"try again in {math.ceil(error.retry_after_s)} s")
    else:
        parts.append(_advice(error))
    line = "; ".join(filter(None, parts))
    if isinstance(error, APIStatusError) and error.request_id:
        line += f" (request {error.request_id})"
    return line


def _advice(error: LoraplexError) -> str:
    code = _code(error)
    if code == "not_found" and isinstance(error, APIStatusError) and not error.request_id:
        return ""  # no server's: a proxy before a fleet says where to ask instead
    return _ADVICE_BY_CODE.get(code, _ADVICE.get(type(error), ""))


def _code(error: LoraplexError) -> str:
    return (error.code or "") if isinstance(error, APIStatusError) else ""


def _unreachable(error: APIConnectionError) -> str:
    url = urlsplit(error.url)
    server = f"{url.scheme}://{url.netloc}"
    if isinstance(error, APITimeoutError):
        return f"{server} did not answer in time; see whether it is busy: curl {server}/health"
    if error.was_connected:
        return f"the connection to {server} broke ({error.problem}); look at the server's log"
    return (
        f"cannot reach a server at {server} ({error.problem}); start one with `loraplex serve`, "
        "or say where it is with --base-url or LORAPLEX_BASE_URL"
    )
