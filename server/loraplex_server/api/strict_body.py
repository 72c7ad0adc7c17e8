"""The base of every JSON body: strict types, no unknown fields, and nothing accepted and ignored.

A field of another server's API that is not implemented is refused by name, unless it has a value
that asks for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, LiteralString

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from loraplex_server.text.errors import InvalidText
from loraplex_server.text.vocabulary import check_text


def invalid(message: LiteralString, param: str | None = None) -> PydanticCustomError:
    """Return the error to raise in a validator; `param` is the field if it is another one."""
    return PydanticCustomError("invalid", message, {"param": param} if param else None)


def check_unicode(value: str) -> str:
    """Return the text; raises ValueError where it has half a surrogate pair."""
    try:
        check_text(value)
    except InvalidText as error:
        raise ValueError(str(error)) from None
    return value


class StrictBody(BaseModel):
    """Strict types, no unknown fields, no-op values of unsupported ones."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name not in cls.unsupported:
                kept[name] = value
            elif value is not None and value not in cls.unsupported[name]:
                raise PydanticCustomError(
                    "unsupported", "this server does not support it", {"param": name}
                )
        return kept
