"""Whether a JSON schema says only what is enforced, and is small enough to compile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from loraplex_server.text.errors import InvalidGrammar

MAX_DEPTH: Final = 48
#: Depth x references of one schema. The compiler follows references by recursion, so this bounds
#: its stack; 8 MB of it overflow at some 4,000.
MAX_REFERENCED_DEPTH: Final = 1_000

_SCHEMA_VALUES: Final = frozenset({"additionalProperties", "items"})
_SCHEMA_LISTS: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SCHEMA_MAPS: Final = frozenset({"$defs", "definitions", "patternProperties", "properties"})
_ENFORCED: Final = frozenset(
    {
        *("$ref", "const", "enum", "format", "pattern", "required", "type"),
        *("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"),
        *("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties"),
    }
)
_SAYS_NOTHING: Final = frozenset(
    {
        *("$anchor", "$comment", "$id", "$schema", "default", "deprecated", "description"),
        *("discriminator", "examples", "id", "readOnly", "title", "writeOnly"),
    }
)
_HINTS: Final[Mapping[str, str]] = {
    "nullable": '; write `"type": ["...", "null"]`',
    "x-guidance": "; it would change how the schema itself is read",
}


def check_schema(schema: Mapping[str, Any], *, param: str | None = None) -> None:
    """Refuse what would not be enforced, and what could not be compiled.

    Raises:
        InvalidGrammar: it names the keyword and where it stands.
    """
    deepest, num_references = 1, 0
    todo: list[tuple[str, Any, int]] = [("#", schema, 1)]
    while todo:
        path, node, depth = todo.pop()
        if isinstance(node, bool):
            continue
        if not isinstance(node, Mapping):
            raise InvalidGrammar(f"JSON schema at {path}: not an object", param=param)
        deepest = max(deepest, depth)
        num_references += "$ref" in node
        if depth > MAX_DEPTH:
            raise InvalidGrammar(f"the JSON schema is deeper than {MAX_DEPTH} levels", param=param)
        for key, value in node.items():
            todo.extend(
                (f"{path}/{key}{tail}", child, depth + 1)
                for tail, child in _children(path, key, value, param)
            )
    if deepest * num_references > MAX_REFERENCED_DEPTH:
        raise InvalidGrammar(
            f"the JSON schema has {num_references} references and {deepest} levels; their product"
            f" may be {MAX_REFERENCED_DEPTH} at most",
            param=param,
        )


def _children(path: str, key: str, value: Any, param: str | None) -> Iterable[tuple[str, Any]]:
    """Return the schemas right below a keyword, each with the rest of its path."""
    if key in _SCHEMA_VALUES:
        return [("", value)]
    if key in _SCHEMA_LISTS and isinstance(value, list):
        return [(f"/{index}", child) for index, child in enumerate(value)]
    if key in _SCHEMA_MAPS and isinstance(value, Mapping):
        return [(f"/{name}", child) for name, child in value.items()]
    is_extension = key.startswith("x-") and key != "x-guidance"
    if key in _ENFORCED or key in _SAYS_NOTHING or is_extension:
        return []
    wrong = "has the wrong type" if key in _SCHEMA_LISTS | _SCHEMA_MAPS else "is not supported"
    raise InvalidGrammar(
        f"JSON schema at {path}: `{key}` {wrong}{_HINTS.get(key, '')}", param=param
    )
