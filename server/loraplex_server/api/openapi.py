"""The OpenAPI document: what FastAPI reads from the routes, and all that can be answered besides.

Every operation can fail in ways that its function does not show: below the application, in the
middleware, in the engine. Which statuses an operation has follows from its method, its path and its
tag, so that a new route is described without a word here; the shape of its errors is found by
writing one. Single operations: `openapi_tables`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from loraplex_server.api.error_table import ERROR_TABLE, HTTP_CODES
from loraplex_server.api.foreign_errors import foreign_error
from loraplex_server.api.openapi_tables import (
    ANSWERS,
    BODIES,
    EXAMPLES,
    MORE_STATUSES,
    STREAMS,
    WHOLE,
)

_COMPONENTS: Final = "#/components/schemas/{model}"
_ERROR: Final = {"$ref": "#/components/schemas/Error"}
_EVENTS: Final = "text/event-stream"
#: `itemSchema` is of OpenAPI 3.2, and what FastAPI writes for streams of its own.
_EVENT_STREAM: Final[Mapping[str, Any]] = {
    "itemSchema": {
        "type": "object",
        "properties": {"data": {"type": "string", "description": "JSON, or [DONE]"}},
        "required": ["data"],
    },
}

#: Of every operation, and in the common shape, as no endpoint has a say in them: no HTTP, no key,
#: another site's page, headers too slow or too long, too many connections.
_OUTSIDE: Final = (400, 401, 403, 408, 431, 503)
#: Of every endpoint: a wrong request, a role that may not, a bug, no engine.
_INSIDE: Final = (400, 403, 500, 503)
#: Of those that take bodies or change something, beside what their tags add: a body too slow or too
#: large.
_CHANGING: Final = (408, 413)
#: Of those with other tags, which are taken to generate.
_GENERATING: Final = (404, 409, 429, 504)
_BY_TAG: Final[Mapping[str, tuple[int, ...]]] = {
    "models": (404, 409),
    "keys": (404, 409),
    "usage": (),
    "audit": (),
    "adapters": (404, 409, 422, 429, 502, 504),
    "vLLM": (404, 422, 429, 502, 504),
    "SGLang": (429, 502, 504),
    "LoRAX": (404, 409, 422, 429, 504),
}
#: A server without keys asks for none.
_SECURITY: Final[list[dict[str, list[str]]]] = [{"key": []}, {"header": []}, {}]
_RETRY_STATUSES: Final = (429, 503)


def install_openapi(app: FastAPI, open_paths: frozenset[str]) -> None:
    """Have `/openapi.json` and `/docs` show the complete document.

    Args:
        open_paths: which need no key.
    """
    make_plain = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = make_plain()
            _Document(document, open_paths).complete()
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]


class _Document:
    """FastAPI's document, being completed in place."""

    def __init__(self, document: dict[str, Any], open_paths: frozenset[str]) -> None:
        self._document = document
        self._open_paths = open_paths
        self._schemas: dict[str, Any] = document.setdefault("components", {}).setdefault(
            "schemas", {}
        )

    def complete(self) -> None:
        """Add what FastAPI cannot know, once."""
        self._add_models()
        components = self._document["components"]
        components["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        for path, operations in self._document["paths"].items():
            for method, operation in operations.items():
                self._add_body(method, path, operation)
                self._add_answers(method, path, operation)
                self._add_errors(method, path, operation)
                # A server without keys asks for none.
                operation["security"] = (
                    [] if path in self._open_paths else [{"key": []}, {"header": []}, {}]
                )
        # How FastAPI would have told of fields; here it is 400, in the shape of all errors.
        self._schemas.pop("HTTPValidationError", None)
        self._schemas.pop("ValidationError", None)

    def _add_models(self) -> None:
        models = {*ANSWERS.values(), *(m for kinds in BODIES.values() for m in kinds.values())}
        ordered = sorted(models, key=lambda model: model.__name__)
        # As they go out, where a field with a default is there too; bodies are told as they come.
        bodies = {model for kinds in BODIES.values() for model in kinds.values()}
        _, found = models_json_schema(
            [(m, "validation" if m in bodies else "serialization") for m in ordered],
            ref_template=_COMPONENTS,
        )
        for name, schema in found["$defs"].items():
            self._schemas.setdefault(name, schema)
        self._schemas["Error"] = _error_schema()

    def _add_body(self, method: str, path: str, operation: dict[str, Any]) -> None:
        if kinds := BODIES.get((method, path)):
            content = {kind: {"schema": _ref(model)} for kind, model in kinds.items()}
            operation["requestBody"] = {"required": True, "content": content}
        if (example := EXAMPLES.get((method, path))) is not None:
            operation["requestBody"]["content"]["application/json"]["example"] = example

    def _add_answers(self, method: str, path: str, operation: dict[str, Any]) -> None:
        responses = operation["responses"]
        [success] = [status for status in responses if status.startswith("2")]
        if model := ANSWERS.get((method, path)):
            responses[success]["content"] = {"application/json": {"schema": _ref(model)}}
        if (method, path) in STREAMS:
            responses[success]["content"] = {}
        can_stream = self._can_stream(operation) and (method, path) not in WHOLE
        if (method, path) in STREAMS or can_stream:
            responses[success]["content"][_EVENTS] = _EVENT_STREAM
        for status in MORE_STATUSES.get((method, path), ()):
            responses[str(status)] = {**responses[success], "description": _phrase(status)}

    def _can_stream(self, operation: Mapping[str, Any]) -> bool:
        content = operation.get("requestBody", {}).get("content", {})
        schema = content.get("application/json", {}).get("schema", {})
        name = schema.get("$ref", "").rpartition("/")[2]
        return "stream" in self._schemas.get(name, {}).get("properties", {})

    def _add_errors(self, method: str, path: str, operation: dict[str, Any]) -> None:
        responses = operation["responses"]
        responses.pop("422", None)
        shapes = [(status, dict(_ERROR)) for status in _OUTSIDE]
        for status in sorted(_inside_statuses(method, path, operation)):
            shown, body = foreign_error(path, status, _EXAMPLE_ERROR)
            shapes.append((shown, _shape_of(body)))
        for status, shape in shapes:
            told = responses.setdefault(str(status), {"description": _phrase(status)})
            schemas = told.setdefault("content", {}).setdefault("application/json", {})
            schemas["schema"] = _either(schemas.get("schema"), shape)
        for status, response in responses.items():
            response["headers"] = dict(_headers(int(status)))
        operation["responses"] = dict(sorted(responses.items()))


def _inside_statuses(method: str, path: str, operation: Mapping[str, Any]) -> set[int]:
    """Return the statuses of an operation's failures, as OpenAI's shape would have them."""
    statuses = {*_INSIDE}
    if "{" in path:
        statuses.add(404)
    if method != "get":
        [tag] = operation["tags"]
        statuses |= {*_CHANGING, *_BY_TAG.get(tag, _GENERATING)}
    return statuses


_EXAMPLE_ERROR: Final[dict[str, Any]] = {
    "message": "`max_tokens`: must be at least 1",
    "type": "invalid_request_error",
    "param": None,
    "code": "invalid_value",
}


def _error_schema() -> dict[str, Any]:
    codes = {shape.code for shape in ERROR_TABLE.values()} | {*HTTP_CODES.values()}
    text, number = {"type": "string"}, {"type": "number", "exclusiveMinimum": 0}
    fields = {
        "message": {**text, "description": "what is wrong, and what to do"},
        "type": {**text, "enum": sorted({shape.type for shape in ERROR_TABLE.values()})},
        "param": {"type": ["string", "null"], "description": "the field it is about"},
        "code": {**text, "enum": sorted(codes | {"invalid_request"})},
        "retry_after_s": {**number, "description": "as `Retry-After`, to the millisecond"},
        "reasons": {"type": "array", "items": text, "description": "why an adapter is refused"},
    }
    required = ["message", "type", "param", "code"]
    error = {"type": "object", "properties": fields, "required": required}
    return {
        "type": "object",
        "title": "Error",
        "properties": {"error": error},
        "required": ["error"],
        "example": {"error": _EXAMPLE_ERROR},
    }


def _shape_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of an error body: the common one, or what another server's looks like."""
    if body == {"error": _EXAMPLE_ERROR}:
        return dict(_ERROR)
    return {**_schema_of(body), "example": body}


def _schema_of(value: Any) -> dict[str, Any]:
    """Return what is certain of values like this one."""
    if isinstance(value, Mapping):
        properties = {key: _schema_of(item) for key, item in value.items()}
        return {"type": "object", "properties": properties, "required": sorted(value)}
    kinds = {str: "string", bool: "boolean", int: "integer"}
    return {"type": kinds[type(value)]} if type(value) in kinds else {}


def _either(known: Mapping[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of bodies that are of one kind or the other."""
    if not known:
        return other
    kinds = [*known.get("anyOf", [known])]
    return {"anyOf": [*kinds, other]} if other not in kinds else dict(known)


def _headers(status: int) -> Iterator[tuple[str, dict[str, Any]]]:
    description = "of the request, or drawn"
    yield "x-request-id", {"description": description, "schema": {"type": "string"}}
    if status in _RETRY_STATUSES:
        schema = {"type": "integer", "minimum": 1}
        yield "retry-after", {"description": "seconds, where it is known", "schema": schema}


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _COMPONENTS.format(model=model.__name__)}
