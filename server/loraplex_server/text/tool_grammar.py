"""Grammars of answers that call tools, in llguidance's Lark, for `text.grammars.lark`.

A forced answer is a call and nothing else. One that may call is any text with calls in it, each of
which is a call of a known tool with arguments by its schema: a mark, once written, commits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loraplex_server.text.grammars import json_block, lark
from loraplex_server.text.reasoning import CLOSING
from loraplex_server.text.tool_format import ToolFormat

#: Of one answer that must call: a model that cannot stop calling ends here.
MAX_CALLS: Final = 16
_ANY_TEXT: Final = r"/(.|\n)*/"


@dataclass(frozen=True)
class CallRules:
    """What calls an answer may have.

    Attributes:
        functions: names, and the JSON schema of the arguments of each.
        is_forced: the answer is calls alone, at least one.
        max_calls: None for the family's own bound.
        begins_inside_reasoning: the prompt ends where the model reasons; that comes first.
    """

    functions: Sequence[tuple[str, Mapping[str, Any]]]
    is_forced: bool
    max_calls: int | None = None
    begins_inside_reasoning: bool = False


def call_grammar(
    tool_format: ToolFormat, rules: CallRules, token_id: Callable[[str], int | None]
) -> str:
    """Return the grammar.

    Args:
        token_id: of a mark that is one special token; None for one that is plain text.

    Raises:
        InvalidGrammar: a schema says something that cannot be enforced.
    """
    writer = _GrammarWriter(tool_format, rules, token_id)
    return lark(writer.forced() if rules.is_forced else writer.free(), param="tools")


class _GrammarWriter:
    def __init__(
        self, tool_format: ToolFormat, rules: CallRules, token_id: Callable[[str], int | None]
    ) -> None:
        self._format = tool_format
        self._rules = rules
        self._token_id = token_id
        bounds = (rules.max_calls, tool_format.max_calls, MAX_CALLS)
        self._max_calls = min(bound for bound in bounds if bound is not None)

    def forced(self) -> str:
        """Return the text of a grammar of calls alone."""
        start = "calls"
        lines = self._lines()
        if self._rules.begins_inside_reasoning:
            start = "thought calls"
            lines.append(rf"thought[lazy]: /(.|\n)*{_escaped(CLOSING)}\s*/")
        return "\n".join([f"start: {start}", *lines])

    def free(self) -> str:
        """Return the text of a grammar of any text with calls in it."""
        syntax = self._format.syntax
        opening, more = syntax.opening, min(self._max_calls, MAX_CALLS)
        if syntax.is_bare:
            mark = self._mark(opening)
            lines = [f"start: {mark}? group | PLAIN", r'PLAIN: /\s*[^{\s](.|\n)*/ | ""']
            return "\n".join([*lines, *self._lines()])
        groups = 1 if self._format.list_marks[0] else more
        lines = [f"start: {_up_to(groups, 'before group')} rest"]
        if self._token_id(opening) is not None:
            lines += [f"before: TEXT {self._mark(opening)}", "rest: TEXT", f"TEXT: {_ANY_TEXT}"]
        else:
            found = rf"/(.|\n)*{_escaped(opening)}/"
            without = rf"{_ANY_TEXT} & ~/(.|\n)*{_escaped(opening)}(.|\n)*/"
            lines += [f"before[lazy]: {found}", "rest: REST", f"REST: {without}"]
        return "\n".join([*lines, *self._lines()])

    def _lines(self) -> list[str]:
        """Return the rules `calls`, of all calls with their marks, and `group`, behind a mark."""
        tool_format, more = self._format, self._max_calls - 1
        first, last = tool_format.list_marks
        opening = self._mark(tool_format.syntax.opening)
        between = json.dumps(tool_format.separator) if tool_format.separator else ""
        if first:
            more_calls = _up_to(more, f"{between} call")
            group = f"{json.dumps(first)} call {more_calls} {json.dumps(last)}"
            calls = f"{opening} group"
        elif tool_format.syntax.is_bare:
            group, calls = "call", "call"
        else:
            closing = tool_format.syntax.closing
            group = f"call {json.dumps(chr(10) + closing)}" if closing else "call"
            calls = f"{opening} group {_up_to(more, f'{between} {opening} group')}"
            if closing:
                group = rf"/\s?/ {group}"
        return [f"calls: {calls}", f"group: {group}", f"call: {self._call()}"]

    def _call(self) -> str:
        if self._format.is_named:
            args = self._mark("[ARGS]")
            parts = [
                f"{json.dumps(name)} {args} %json {json_block(schema, param='tools')}"
                for name, schema in self._rules.functions
            ]
            return " | ".join(parts)
        parts = []
        for name, schema in self._rules.functions:
            head = f'{json.dumps(name)}, "{self._format.arguments_key}": '
            parts.append(f"{json.dumps(head)} %json {json_block(schema, param='tools')}")
        return f'{json.dumps(json.dumps("name").join(["{", ": "]))} ({" | ".join(parts)}) "}}"'

    def _mark(self, mark: str) -> str:
        token_id = self._token_id(mark)
        return json.dumps(mark) if token_id is None else f"<[{token_id}]>"


def _up_to(number: int, item: str) -> str:
    return f"({item}){{0,{number}}}" if number else ""


def _escaped(mark: str) -> str:
    """Return a mark as it stands within a regular expression of Lark."""
    return "".join(char if char.isalnum() or char in "_<>" else f"\\{char}" for char in mark)
