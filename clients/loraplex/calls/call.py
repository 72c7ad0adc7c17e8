"""One request as data, and the parts that requests are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias, TypeVar
from urllib.parse import quote

from loraplex.errors import UsageError
from loraplex.multipart import MultipartBody
from loraplex.types import ApiModel, Page

AnswerT = TypeVar("AnswerT", bound=ApiModel)
ItemT = TypeVar("ItemT", bound=ApiModel)

Params: TypeAlias = Mapping[str, str | int | float]


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
        return headers


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
