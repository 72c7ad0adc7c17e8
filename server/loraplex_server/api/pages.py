"""Lists of which a client reads one page after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Query

_T = TypeVar("_T")

Limit = Annotated[int, Query(ge=1, le=1000, description="How many to return at most.")]
After = Annotated[
    str | None, Query(max_length=512, description="`last` of the page before this one.")
]


def page_of(
    found: Sequence[_T],
    limit: int,
    write: Callable[[_T], dict[str, Any]],
    cursor: Callable[[_T], str],
) -> dict[str, Any]:
    """Return a page of `limit` entries; one more of `found` says that there are more."""
    shown = found[:limit]
    return {
        "object": "list",
        "data": [write(entry) for entry in shown],
        "has_more": len(found) > limit,
        "last": cursor(shown[-1]) if shown else None,
    }
