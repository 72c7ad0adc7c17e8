"""One call of a tool, read while it is being written.

A reader is fed from the call's first character on. It says nothing until it knows that this is a
call of a known tool; from then on it hands on the arguments as they come. What turns out to be no
call is given back whole. All decisions depend on the text alone, never on how it was cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

from loraplex_server.text.tool_pieces import CallArguments, CallStart, Piece

#: `{"name": "f", "arguments": {`, with whatever white space, and Llama's word for arguments.
_JSON_HEAD: Final = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
#: Mistral's newer way: `f[ARGS]{`, perhaps with an id of its own in between.
_NAMED_HEAD: Final = re.compile(r"\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\s*(?:\[ARGS\])?\s*(?=\{)")
#: What such a head may look like before its `{`: names are no longer than this.
_MAX_NAMED_HEAD: Final = 256


class JsonSpan:
    """Finds where a JSON object ends, character by character; it must begin with the brace."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.is_complete = False

    def push(self, text: str) -> int:
        """Return how many characters of `text` still belong to the object."""
        if self.is_complete:
            return 0
        for position, char in enumerate(text):
            if self._in_string:
                self._push_in_string(char)
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.is_complete = True
                    return position + 1
        return len(text)

    def _push_in_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False


class CallReader(Protocol):
    """Reads one call.

    Attributes:
        is_call: whether a call was recognised; nothing takes it back.
        raw: what was read so far of something not recognised yet.
    """

    is_call: bool
    raw: str

    @property
    def is_complete(self) -> bool:
        """The call, or what looked like one, has ended."""
        ...

    def push(self, text: str) -> tuple[list[Piece], str]:
        """Return what the text says of the call, and the text behind the call's end."""
        ...


class JsonCallReader:
    """Implements `CallReader` for `{"name": ..., "arguments": {...}}`, in either order."""

    def __init__(self, names: Collection[str], new_id: Callable[[], str]) -> None:
        self.is_call = False
        self.raw = ""
        self._names = names
        self._new_id = new_id
        self._object = JsonSpan()
        self._arguments = JsonSpan()

    @property
    def is_complete(self) -> bool:
        return self._object.is_complete

    def push(self, text: str) -> tuple[list[Piece], str]:
        """See `CallReader`."""
        num_own = self._object.push(text)
        own, rest = text[:num_own], text[num_own:]
        if self.is_call:
            return self._argue(own), rest
        self.raw += own
        return self._recognise(), rest

    def _recognise(self) -> list[Piece]:
        head = _JSON_HEAD.match(self.raw)
        if head is not None and head["name"] in self._names:
            self.is_call = True
            return [CallStart(self._new_id(), head["name"]), *self._argue(self.raw[head.end() :])]
        if not self.is_complete or (call := _parse(self.raw)) is None:
            return []
        name, arguments = call
        if name not in self._names:
            return []
        self.is_call = True
        return [CallStart(self._new_id(), name), CallArguments(arguments)]

    def _argue(self, text: str) -> list[Piece]:
        num_own = self._arguments.push(text)
        return [CallArguments(text[:num_own])] if num_own else []


class NamedCallReader:
    """Implements `CallReader` for Mistral's `name[ARGS]{...}`."""

    def __init__(self, names: Collection[str], new_id: Callable[[], str]) -> None:
        self.is_call = False
        self.raw = ""
        self._is_complete = False
        self._names = names
        self._new_id = new_id
        self._arguments = JsonSpan()

    @property
    def is_complete(self) -> bool:
        return self._is_complete

    def push(self, text: str) -> tuple[list[Piece], str]:
        """See `CallReader`."""
        if self.is_call:
            return self._argue(text)
        whole = self.raw + text
        start = whole.find("{")
        self.raw = whole if start < 0 else whole[:start]
        if start < 0 and len(whole) <= _MAX_NAMED_HEAD:
            return [], ""
        head = _NAMED_HEAD.match(whole) if 0 <= start <= _MAX_NAMED_HEAD else None
        if head is None or head.end() != start or head["name"] not in self._names:
            self.raw, rest = whole[:_MAX_NAMED_HEAD], whole[_MAX_NAMED_HEAD:]
            if 0 <= start <= _MAX_NAMED_HEAD:
                self.raw, rest = whole[:start], whole[start:]
            self._is_complete = True
            return [], rest
        self.is_call = True
        pieces, rest = self._argue(whole[start:])
        return [CallStart(self._new_id(), head["name"]), *pieces], rest

    def _argue(self, text: str) -> tuple[list[Piece], str]:
        num_own = self._arguments.push(text)
        self._is_complete = self._arguments.is_complete
        pieces: list[Piece] = [CallArguments(text[:num_own])] if num_own else []
        return pieces, text[num_own:]


def _parse(raw: str) -> tuple[str, str] | None:
    """Return name and arguments of a call written in an unusual way; None if it is none."""
    try:
        call = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str):
        return None
    arguments: Any = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):  # JSON within JSON, as some models write it
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)
