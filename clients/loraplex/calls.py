"""Every request the SDK can make, as data: what to send, and what the answer is.

One function per operation. The sync and async clients both send these, so an operation is
described once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from loraplex.adapter_files import default_name, find_parts
from loraplex.adapter_options import AdapterSettings, RegisterOptions
from loraplex.errors import UsageError
from loraplex.multipart import MultipartBody, Progress
from loraplex.options import ChatOptions, CompletionOptions, Messages, Prompt
from loraplex.types import (
    Adapter,
    AdapterDeleted,
    AdapterPage,
    AdapterPrefetch,
    AdapterValidation,
    AdapterVersions,
    ApiModel,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Health,
    Model,
    ModelList,
    Pool,
)

AnswerT = TypeVar("AnswerT", bound=ApiModel)


@dataclass(frozen=True)
class Call(Generic[AnswerT]):
    """One request, ready to be sent any number of times.

    Attributes:
        answer_type: Of the response, or of each event when `is_stream`.
        is_repeatable: See `loraplex.retry`.
        answer_statuses: Error statuses whose body is an answer all the same.
    """

    method: str
    path: str
    answer_type: type[AnswerT]
    params: Mapping[str, str | int | float] | None = None
    json: Mapping[str, Any] | None = None
    upload: MultipartBody | None = None
    is_stream: bool = False
    is_repeatable: bool = True
    answer_statuses: frozenset[int] = frozenset()

    @property
    def headers(self) -> dict[str, str]:
        """Headers that follow from the request itself."""
        headers = {"Accept": "text/event-stream" if self.is_stream else "application/json"}
        if self.upload:
            headers["Content-Type"] = self.upload.content_type
            headers["Content-Length"] = str(self.upload.content_length)
        return headers


def create_completion(model: str, prompt: Prompt, options: CompletionOptions) -> Call[Completion]:
    """POST /v1/completions."""
    body = _body({"model": model, "prompt": prompt}, options)
    return Call("POST", "/v1/completions", Completion, json=body)


def stream_completion(
    model: str, prompt: Prompt, options: CompletionOptions
) -> Call[CompletionChunk]:
    """POST /v1/completions with stream=true."""
    body = _body({"model": model, "prompt": prompt, "stream": True}, options)
    return Call("POST", "/v1/completions", CompletionChunk, json=body, is_stream=True)


def create_chat(model: str, messages: Messages, options: ChatOptions) -> Call[ChatCompletion]:
    """POST /v1/chat/completions."""
    body = _body({"model": model, "messages": _turns(messages)}, options)
    return Call("POST", "/v1/chat/completions", ChatCompletion, json=body)


def stream_chat(model: str, messages: Messages, options: ChatOptions) -> Call[ChatCompletionChunk]:
    """POST /v1/chat/completions with stream=true."""
    body = _body({"model": model, "messages": _turns(messages), "stream": True}, options)
    return Call("POST", "/v1/chat/completions", ChatCompletionChunk, json=body, is_stream=True)


def list_models() -> Call[ModelList]:
    """GET /v1/models."""
    return Call("GET", "/v1/models", ModelList)


def retrieve_model(model_id: str) -> Call[Model]:
    """GET /v1/models/{id}."""
    return Call("GET", f"/v1/models/{_segment(model_id)}", Model)


def push_adapter(
    path: Path, name: str | None, on_progress: Progress | None, options: RegisterOptions
) -> Call[Adapter]:
    """POST /v1/adapters. Looks at the files now, reads them when it is sent."""
    parts = find_parts(path)
    # The name comes first: a server can refuse it before it reads the files.
    fields = {"name": _checked_name(default_name(path) if name is None else name)}
    for field, value in options.items():
        fields[field] = value if isinstance(value, str) else json.dumps(value)
    upload = MultipartBody(fields, parts, on_progress)
    return Call("POST", "/v1/adapters", Adapter, upload=upload, is_repeatable=False)


def fetch_adapter(
    name: str, source: str, sha256: str | None, options: RegisterOptions
) -> Call[Adapter]:
    """POST /v1/adapters, for the server to fetch."""
    body = {"name": _checked_name(name), "source": source, **options}
    if sha256 is not None:
        body["sha256"] = sha256
    return Call("POST", "/v1/adapters", Adapter, json=body, is_repeatable=False)


def validate_adapter(
    path: Path, check_base: bool, on_progress: Progress | None
) -> Call[AdapterValidation]:
    """POST /v1/adapters/validate."""
    fields = {"check_base": json.dumps(check_base)}
    upload = MultipartBody(fields, find_parts(path), on_progress)
    return Call("POST", "/v1/adapters/validate", AdapterValidation, upload=upload)


def list_versions(name: str, page_size: int, after: int | None) -> Call[AdapterVersions]:
    """GET /v1/adapters/{name}/versions, one page."""
    params: dict[str, str | int] = {"limit": page_size}
    if after is not None:
        params["after"] = after
    path = f"/v1/adapters/{_segment(name)}/versions"
    return Call("GET", path, AdapterVersions, params=params)


def roll_back_adapter(name: str, version: int | None, adapter_id: str | None) -> Call[Adapter]:
    """POST /v1/adapters/{name}/rollback."""
    if (version is None) == (adapter_id is None):
        raise UsageError("give either the number of a version or its id")
    body = {"version": version} if adapter_id is None else {"id": adapter_id}
    return Call("POST", f"/v1/adapters/{_segment(name)}/rollback", Adapter, json=body)


def change_adapter(name: str, settings: AdapterSettings) -> Call[Adapter]:
    """PATCH /v1/adapters/{name}."""
    return Call("PATCH", f"/v1/adapters/{_segment(name)}", Adapter, json=dict(settings))


def list_adapters(page_size: int, after: str | None) -> Call[AdapterPage]:
    """GET /v1/adapters, one page."""
    params: dict[str, str | int] = {"limit": page_size}
    if after is not None:
        params["after"] = after
    return Call("GET", "/v1/adapters", AdapterPage, params=params)


def get_adapter(name: str) -> Call[Adapter]:
    """GET /v1/adapters/{name}."""
    return Call("GET", f"/v1/adapters/{_segment(name)}", Adapter)


def delete_adapter(name: str, mode: str | None, timeout_s: float | None) -> Call[AdapterDeleted]:
    """DELETE /v1/adapters/{name}."""
    params: dict[str, str | int | float] = {}
    if mode is not None:
        params["mode"] = mode
    if timeout_s is not None:
        params["timeout_s"] = timeout_s
    path = f"/v1/adapters/{_segment(name)}"
    return Call("DELETE", path, AdapterDeleted, params=params, is_repeatable=False)


def prefetch_adapter(name: str) -> Call[AdapterPrefetch]:
    """POST /v1/adapters/{name}/prefetch."""
    return Call("POST", f"/v1/adapters/{_segment(name)}/prefetch", AdapterPrefetch)


def get_pool() -> Call[Pool]:
    """GET /v1/pool."""
    return Call("GET", "/v1/pool", Pool)


def get_health() -> Call[Health]:
    """GET /health. 503 is an answer: it says what the server is doing."""
    return Call("GET", "/health", Health, answer_statuses=frozenset({503}))


def _body(fields: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the fields of a request; None means that a field was not given."""
    given = {name: value for name, value in options.items() if value is not None}
    extra = given.pop("extra_body", {})
    return {**fields, **given, **extra}


def _turns(messages: Messages) -> list[Mapping[str, Any]]:
    """Return messages as JSON values; an earlier answer's message may be among them."""
    return [
        turn.model_dump(exclude_none=True) if isinstance(turn, BaseModel) else turn
        for turn in messages
    ]


def _checked_name(name: str) -> str:
    """Refuse a name that no request could carry. The rest is the server's to judge."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the name {name!r} is not valid text") from error
    if not name:
        raise UsageError("the name is empty")
    return name


def _segment(name: str) -> str:
    """Encode a name as one path segment, whatever is in it: "/", "%", or nothing but dots."""
    quoted = quote(_checked_name(name), safe="")
    return quoted.replace(".", "%2E") if quoted in (".", "..") else quoted
