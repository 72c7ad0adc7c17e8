"""One request as data, and the parts that requests are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeAlias, TypeVar
from urllib.parse import quote

from loraplex.errors import UsageError
from loraplex.multipart import MultipartBody
from loraplex.types import ApiModel, Page

AnswerT = TypeVar("AnswerT", bound=ApiModel)
ItemT = TypeVar("ItemT", bound=ApiModel)

Params: TypeAlias = Mapping[str, str | int | float]

#: Names the adapter for balancers, which then send its requests to one replica without reading
#: bodies. Servers take no notice.
AFFINITY_HEADER: Final = "X-Loraplex-Model"
#: What is longer is no adapter's name, and for the server to refuse.
_MAX_KEY_CHARS: Final = 256


@dataclass(frozen=True)
class Call(Generic[AnswerT]):
    """One request, ready to be sent any number of times.

    Attributes:
        answer_type: Of the response, or of each event when `is_stream`.
        is_repeatable: See `loraplex.retry`.
        answer_statuses: Error statuses whose body is an answer all the same.
        accept: What kind of answer is asked for, when it is no stream.
    """

    method: str
    path: str
    answer_type: type[AnswerT]
    params: Params | None = None
    json: Mapping[str, Any] | None = None
    upload: MultipartBody | None = None
    is_stream: bool = False
    is_repeatable: bool = True
    answer_statuses: frozenset[int] = frozenset()
    accept: str = "application/json"

    @property
    def headers(self) -> dict[str, str]:
        """Headers that follow from the request itself."""
        headers = {"Accept": "text/event-stream" if self.is_stream else self.accept}
        if self.upload:
            headers["Content-Type"] = self.upload.content_type
            headers["Content-Length"] = str(self.upload.content_length)
        if (name := affinity_key(self.json or {})) is not None:
            headers[AFFINITY_HEADER] = name
        return headers


def affinity_key(body: Mapping[str, Any]) -> str | None:
    """Return the name a request asks for, None if it asks several or a header cannot carry it."""
    if "models" in body or "adapters" in body:
        return None
    # An adapter beside the base model's name says more than that.
    names = (body.get(field) for field in ("adapter_id", "lora_path", "model"))
    name = next((name for name in names if isinstance(name, str)), "")
    is_plain = name.isascii() and name.isprintable() and name == name.strip()
    return name if is_plain and 0 < len(name) <= _MAX_KEY_CHARS else None


def list_call(
    path: str, page_type: type[Page[ItemT]], page_size: int, **only: str | int | None
) -> Call[Page[ItemT]]:
    """Return the call of a list's first page; of `only`, what is None is not asked for."""
    return Call("GET", path, page_type, params={"limit": page_size, **given(only)})


def next_page(call: Call[Page[ItemT]], page: Page[ItemT]) -> Call[Page[ItemT]] | None:
    """Return the call of the page after this one, None after the last."""
    after = (call.params or {}).get("after")
    if not page.has_more or page.last is None or page.last == after:
        return None
    return replace(call, params={**(call.params or {}), "after": page.last})


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that were given: None means that one was not."""
    return {name: value for name, value in fields.items() if value is not None}


def body_of(fields: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the fields of a request; None means that a field was not given."""
    merged = given({**fields, **options})
    extra = merged.pop("extra_body", {})
    return {**merged, **extra}


def checked_name(name: str) -> str:
    """Refuse a name that no request could carry. The rest is the server's to judge."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the name {name!r} is not valid text") from error
    if not name:
        raise UsageError("the name is empty")
    return name


def segment(name: str) -> str:
    """Encode a name as one path segment, whatever is in it: "/", "%", or nothing but dots."""
    quoted = quote(checked_name(name), safe="")
    return quoted.replace(".", "%2E") if quoted in (".", "..") else quoted
