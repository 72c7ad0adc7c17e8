"""What every answer is, and what pages of lists are.

Fields the SDK does not know are kept (`extra="allow"`), and what a server may leave out is
optional, so an older SDK reads a newer server. Closed sets of words (states, finish reasons) are
plain strings for the same reason.
"""

from __future__ import annotations

from typing import Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict


class ApiModel(BaseModel):
    """Base of every response."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    @classmethod
    def from_body(cls, content: bytes) -> Self:
        """Read the body of a response: JSON, unless a type says otherwise.

        Raises:
            ValueError: It is something else (pydantic's `ValidationError` is one).
        """
        return cls.model_validate_json(content)


ItemT = TypeVar("ItemT", bound=ApiModel)


class Page(ApiModel, Generic[ItemT]):
    """One page of a list. `last` is the cursor of the next, where there `has_more`."""

    data: list[ItemT]
    has_more: bool = False
    last: str | int | None = None
