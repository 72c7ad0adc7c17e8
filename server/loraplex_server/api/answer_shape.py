"""The fields that say what an answer must look like, in the ways of OpenAI and of vLLM.

Whichever way is used, it holds from the first token on: no token is chosen that leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from loraplex_server.api.strict_body import StrictBody, invalid

#: Characters of a grammar, an expression or a schema's JSON; all options of a choice together.
MAX_SHAPE_CHARS: Final = 1 << 16
MAX_OPTIONS: Final = 1024

ShapeText = Annotated[str, Field(min_length=1, max_length=MAX_SHAPE_CHARS)]


def _check_schema(value: Any) -> Any:
    """Check by hand what pydantic would report as the errors of both ways."""
    if isinstance(value, str) and not 1 <= len(value) <= MAX_SHAPE_CHARS:
        raise invalid(f"a schema as text has 1 to {MAX_SHAPE_CHARS} characters")
    if value is not None and not isinstance(value, str | dict):
        raise invalid("must be a JSON schema, as an object or as text")
    return value


#: As an object, or as JSON.
Schema = Annotated[
    dict[str, Any] | str,
    BeforeValidator(_check_schema, json_schema_input_type=dict[str, Any] | ShapeText),
]
Options = Annotated[list[ShapeText], Field(min_length=1, max_length=MAX_OPTIONS)]


class ShapeKind(StrEnum):
    """What `AnswerShape.value` is."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class AnswerShape:
    """What the answer must look like, as the request said it; nobody has looked at it yet.

    Attributes:
        param: the field.
        value: a schema as an object or as JSON, an expression, a list of texts or a grammar; None
            for any JSON object.
    """

    param: str
    kind: ShapeKind
    value: Any = None


class JsonSchemaFormat(StrictBody):
    """OpenAI's wrapping of a schema. `strict` may be anything: answers always keep to it."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictBody):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise invalid("goes with the type `json_schema`, and only with it", "json_schema")
        return self

    def shapes(self) -> Iterator[AnswerShape]:
        """Return what it asks for, if anything."""
        if self.type == "json_object":
            yield AnswerShape("response_format", ShapeKind.JSON_OBJECT)
        elif self.json_schema is not None:
            schema = self.json_schema.schema_
            # A schema that was left out allows everything, as an empty one does.
            yield AnswerShape("response_format", ShapeKind.JSON_SCHEMA, schema or {})


class StructuredOutputs(StrictBody):
    """vLLM's `structured_outputs`: exactly one way of saying what the answer must look like."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (False,),
        # There is one backend, and nothing to fall back to.
        "disable_fallback": (True, False),
        "structural_tag": (),
        "whitespace_pattern": (),
    }

    json_: Schema | None = Field(default=None, alias="json")
    regex: ShapeText | None = None
    choice: Options | None = None
    grammar: ShapeText | None = None
    json_object: bool | None = None

    def shapes(self) -> Iterator[AnswerShape]:
        """Return what it asks for; more than one is for the caller to refuse."""
        yield from _shapes("structured_outputs.", self.json_, self.regex, self.choice, self.grammar)
        if self.json_object:
            yield AnswerShape("structured_outputs.json_object", ShapeKind.JSON_OBJECT)


class ShapeFields(StrictBody):
    """The base of bodies whose answers can be given a shape; at most one field of them does."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: ShapeText | None = None
    guided_choice: Options | None = None
    guided_grammar: ShapeText | None = None

    @model_validator(mode="after")
    def _check_shapes(self) -> ShapeFields:
        if len(shapes := list(self._shapes())) > 1:
            raise invalid("only one field may say what the answer must look like", shapes[1].param)
        return self

    @property
    def shape(self) -> AnswerShape | None:
        """What the answer must look like; None is anything."""
        return next(self._shapes(), None)

    def _shapes(self) -> Iterator[AnswerShape]:
        for given in (self.response_format, self.structured_outputs):
            if given is not None:
                yield from given.shapes()
        yield from _shapes(
            "guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar
        )


def _shapes(prefix: str, json: Any, regex: Any, choice: Any, grammar: Any) -> Iterator[AnswerShape]:
    given = (
        ("json", ShapeKind.JSON_SCHEMA, json),
        ("regex", ShapeKind.REGEX, regex),
        ("choice", ShapeKind.CHOICE, choice),
        ("grammar", ShapeKind.GRAMMAR, grammar),
    )
    for name, kind, value in given:
        if value is not None:
            yield AnswerShape(prefix + name, kind, value)
