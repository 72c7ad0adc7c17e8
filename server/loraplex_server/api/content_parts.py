"""Content that is one text or a list of parts, told apart by their `type`.

Checked by hand: of a choice of kinds, pydantic would report the errors of every one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

from loraplex_server.api.strict_body import StrictBody, invalid


def as_parts(value: Any) -> Any:
    """Return content as a list of parts: a text is one."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def check_part(
    value: Any, kinds: Mapping[str, type[StrictBody]], *, usual: str | None = None
) -> StrictBody:
    """Return a part, checked as what its `type` says it is.

    Args:
        kinds: those that this server reads.
        usual: of a part without a type.

    Raises:
        PydanticCustomError, ValidationError: naming the field.
    """
    if not isinstance(value, dict):
        raise invalid("must be an object with a `type`")
    kind = kinds.get(str(value.get("type", usual)))
    if kind is None:
        *others, last = [f"`{name}`" for name in kinds]
        known = f"{', '.join(others)} or {last}"
        raise PydanticCustomError(
            "invalid", "this server reads only {known}", {"known": known, "param": "type"}
        )
    return kind.model_validate(value)
