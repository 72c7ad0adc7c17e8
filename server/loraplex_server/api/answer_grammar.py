"""From what a request says of its answer's shape to the grammar that the engine follows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
import anyio.to_thread

from loraplex_server.api.answer_shape import AnswerShape, ShapeKind
from loraplex_server.text import grammars
from loraplex_server.text.errors import InvalidGrammar
from loraplex_server.text.time_limit import TookTooLong, run_within

#: For checking one grammar, which its writer can make as hard as its size allows.
_CHECK_S: Final = 5.0
_MAX_AT_WORK: Final = 2


@dataclass(frozen=True)
class GrammarWriter:
    """Writes grammars in threads of its own, so that none holds up the event loop; immutable."""

    threads: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(_MAX_AT_WORK)
    )

    async def write(self, shape: AnswerShape) -> str:
        """Return the grammar; raises InvalidGrammar, naming the field."""
        return await anyio.to_thread.run_sync(_write_in_time, shape, limiter=self.threads)


def _write_in_time(shape: AnswerShape) -> str:
    try:
        return run_within(_CHECK_S, lambda: _write(shape))
    except TookTooLong as error:
        raise InvalidGrammar(f"checking it was given up: {error}", param=shape.param) from error


def _write(shape: AnswerShape) -> str:
    param = shape.param
    if shape.kind is ShapeKind.JSON_OBJECT:
        return grammars.json_object(param=param)
    if shape.kind is ShapeKind.JSON_SCHEMA:
        return grammars.json_schema(_schema(shape), param=param)
    if shape.kind is ShapeKind.REGEX:
        return grammars.regex(shape.value, param=param)
    if shape.kind is ShapeKind.CHOICE:
        return grammars.choice(shape.value, param=param)
    return grammars.lark(shape.value, param=param)


def _schema(shape: AnswerShape) -> Mapping[str, Any]:
    """Return the schema as an object, also where it was sent as text."""
    if not isinstance(shape.value, str):
        schema: Mapping[str, Any] = shape.value
        return schema
    try:
        parsed = json.loads(shape.value)
    except (ValueError, RecursionError) as error:
        raise InvalidGrammar(f"the schema is not JSON: {error}", param=shape.param) from None
    if not isinstance(parsed, dict):
        raise InvalidGrammar("the schema must be a JSON object", param=shape.param)
    return parsed
