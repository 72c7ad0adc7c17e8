"""Grammars that an answer must follow: what users write, checked, as llguidance reads it.

Every function returns the grammar in llguidance's own notation, or raises InvalidGrammar. Nothing
a user wrote is ever ignored: a JSON schema with a keyword that would not be enforced is refused.

llguidance's compiler recurses, and a chain of some thousand references overflows its stack, which
no exception handler sees. So sizes, depth and references are bounded here, before it is called.
It is imported when the first grammar comes: a server without it serves everything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loraplex_server.text.errors import InvalidGrammar
from loraplex_server.text.schema_check import check_schema

#: Characters of one grammar as a user wrote it.
MAX_GRAMMAR_CHARS: Final = 65_536
MAX_PATTERN_CHARS: Final = 8_192
MAX_CHOICES: Final = 1_000
MAX_RULES: Final = 1_000

#: Between the tokens of JSON. Any amount of it would be JSON as well, but a small model that has
#: begun to write spaces may never write anything else.
_LAYOUT: Final = {"whitespace_pattern": r"(\n[ \t]{0,32}| )?"}
_JSON_BLOCK: Final = re.compile(r"%json\b\s*")


def json_object(*, param: str | None = None) -> str:
    """Return the grammar of any JSON object."""
    return json_schema({"type": "object"}, param=param)


def json_schema(schema: Mapping[str, Any], *, param: str | None = None) -> str:
    """Return the grammar of the JSON texts that `schema` allows.

    Args:
        schema: JSON Schema of the keywords that `schema_check` names.
        param: the request's field, for the error.

    Raises:
        InvalidGrammar: too large, or it says something that cannot be enforced.
    """
    text = json_block(schema, param=param)
    return _checked(_matcher().grammar_from_json_schema(text), "JSON schema", param)


def json_block(schema: Mapping[str, Any], *, param: str | None = None) -> str:
    """Return what stands behind `%json` in a Lark grammar for the texts that `schema` allows.

    Raises:
        InvalidGrammar: as `json_schema`, for what can be seen without compiling it.
    """
    try:
        text = json.dumps({**schema, "x-guidance": _LAYOUT}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidGrammar(f"the JSON schema is not JSON: {error}", param=param) from None
    _check_length(text, MAX_GRAMMAR_CHARS, "JSON schema", param)
    check_schema(schema, param=param)
    return text


def regex(pattern: str, *, param: str | None = None) -> str:
    """Return the grammar of the texts that `pattern` matches as a whole (Rust's syntax)."""
    _check_length(pattern, MAX_PATTERN_CHARS, "pattern", param)
    return _checked(_matcher().grammar_from_regex(pattern), "pattern", param)


def choice(options: Sequence[str], *, param: str | None = None) -> str:
    """Return the grammar whose texts are `options`, each as it stands.

    Raises:
        InvalidGrammar: none, too many or too long, or one that is no text.
    """
    if not 0 < len(options) <= MAX_CHOICES:
        raise InvalidGrammar(
            f"give 1 to {MAX_CHOICES} choices, not {len(options)}",
            param=param,
        )
    if not all(isinstance(option, str) for option in options):
        raise InvalidGrammar("each choice must be a string", param=param)
    text = "start: " + " | ".join(map(json.dumps, options))
    _check_length(text, MAX_GRAMMAR_CHARS, "list of choices", param)
    return _checked(_matcher().grammar_from_lark(text), "list of choices", param)


def lark(text: str, *, param: str | None = None) -> str:
    """Return the grammar of a text in llguidance's Lark dialect, or in llama.cpp's GBNF.

    Tokens may be named (`<|im_end|>`, `<[12]>`); whether the model has them shows when the request
    is served. A JSON schema may stand behind `%json` (see `json_block`).

    Raises:
        InvalidGrammar: too large, or not a grammar.
    """
    _check_length(text, MAX_GRAMMAR_CHARS, "grammar", param)
    if text.count("\n") >= MAX_RULES:
        raise InvalidGrammar(f"a grammar may have {MAX_RULES} lines at most", param=param)
    if "::=" in text:
        text = _from_gbnf(text, param)
    for match in _JSON_BLOCK.finditer(text):
        _check_block(text, match.end(), param)
    return _checked(_matcher().grammar_from_lark(text), "grammar", param)


def _check_block(text: str, start: int, param: str | None) -> None:
    try:
        block, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        block = None
    if not isinstance(block, dict):
        raise InvalidGrammar("`%json` must be followed by a JSON object", param=param)
    if block.get("x-guidance") == _LAYOUT:
        block.pop("x-guidance")
    check_schema(block, param=param)


def _from_gbnf(text: str, param: str | None) -> str:
    _matcher()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:  # noqa: BLE001  # a plain one for whatever it cannot read
        raise InvalidGrammar(f"the grammar cannot be read as GBNF: {error}", param=param) from None


def _check_length(text: str, limit: int, what: str, param: str | None) -> None:
    if len(text) > limit:
        raise InvalidGrammar(
            f"the {what} has {len(text)} characters; {limit} is the most", param=param
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidGrammar(f"the {what} has a lone surrogate", param=param) from None


def _checked(grammar: str, what: str, param: str | None) -> str:
    is_wrong, messages = _matcher().validate_grammar_with_warnings(grammar)
    # Without a tokenizer the names of tokens cannot be judged: the engine does that.
    problems = [m for m in messages if "can't validate" not in m]
    if is_wrong or problems:
        reason = " ".join(problems[0].split()) if problems else "it cannot be compiled"
        raise InvalidGrammar(f"the {what} cannot be enforced: {reason[:500]}", param=param)
    return grammar


def _matcher() -> Any:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise InvalidGrammar(
            "this server cannot constrain answers: the package `llguidance` is not installed"
        ) from None
    return LLMatcher
