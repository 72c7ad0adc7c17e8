"""Calls of tools found in an answer while it is being written.

All families write calls as JSON behind a mark; `CallSyntax` says how they differ. Text that may be
the beginning of a mark is held back until it is known. What only looked like a call is content.
White space around calls is nobody's: at the begin of the answer and behind a call it is held back,
and dropped if another call follows or the answer ends there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from loraplex_server.text.tool_call_reader import CallReader, JsonCallReader, NamedCallReader
from loraplex_server.text.tool_pieces import Content, Piece


@dataclass(frozen=True)
class CallSyntax:
    """How a family writes its calls.

    Attributes:
        opening: the mark in front of calls.
        closing: the mark behind them; "" for none.
        separators: characters that may stand around and between the calls behind one mark.
        is_bare: an answer may begin with a call without any mark.
        has_named_calls: a call may also be a name followed by its arguments.
    """

    opening: str
    closing: str = ""
    separators: str = ""
    is_bare: bool = False
    has_named_calls: bool = False


_SPACE: Final = " \t\r\n"


class _State(Enum):
    START = auto()
    TEXT = auto()
    BETWEEN = auto()
    CALL = auto()


class ToolParser:
    """Reads one answer; not thread-safe."""

    def __init__(
        self,
        syntax: CallSyntax,
        names: Collection[str],
        new_id: Callable[[], str],
        *,
        max_calls: int | None = None,
    ) -> None:
        """Prepare to find calls of these tools; behind `max_calls` of them all is content."""
        self._syntax = syntax
        self._names = names
        self._new_id = new_id
        self._max_calls = max_calls
        self._state = _State.START
        self._buffer = ""
        self._held = ""  # behind the last content: marks and separators of calls to come
        self._space = ""  # white space that belongs to content only if more content follows
        self._is_fresh = True  # no content since the beginning or the last call
        self._num_calls = 0
        self._has_called = False  # behind the last mark
        self._reader: CallReader | None = None

    def push(self, text: str) -> list[Piece]:
        """Return what is certain now."""
        self._buffer += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        """Return what was held back, at the end of the answer."""
        pieces: list[Piece] = []
        reader, self._reader = self._reader, None
        raw = reader.raw if reader is not None and not reader.is_call else ""
        is_end_of_calls = self._state is _State.BETWEEN and self._has_called
        if not (is_end_of_calls and self._syntax.closing.startswith(self._buffer)):
            self._write(pieces, self._held + raw + self._buffer)
        if self._space and not self._num_calls:
            pieces.append(Content(self._space))
        self._buffer = self._held = self._space = ""
        return pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Go on by one step; return False when more text is needed."""
        if self._state is _State.CALL:
            return self._read_call(pieces)
        if not self._buffer:
            return False
        if self._state is _State.START:
            return self._begin()
        if self._state is _State.TEXT:
            return self._read_text(pieces)
        return self._read_between(pieces)

    def _begin(self) -> bool:
        """Decide whether the answer begins with a call without a mark."""
        self._state = _State.TEXT
        if not self._syntax.is_bare:
            return True
        text = self._buffer.lstrip()
        if not text:
            self._state = _State.START
            return False
        if text.startswith("{"):
            self._space, self._buffer = self._buffer[: -len(text)], text
            self._state = _State.BETWEEN
        return True

    def _read_text(self, pieces: list[Piece]) -> bool:
        opening = self._syntax.opening
        if self._num_calls == self._max_calls:
            text, self._buffer = self._buffer, ""
            self._write(pieces, text)
            return False
        start = self._buffer.find(opening)
        if start < 0:
            end = len(self._buffer) - held_len(self._buffer, opening)
            self._write(pieces, self._buffer[:end])
            self._buffer = self._buffer[end:]
            return False
        self._write(pieces, self._buffer[:start])
        self._buffer = self._buffer[start + len(opening) :]
        self._held, self._has_called = opening, False
        self._state = _State.BETWEEN
        return True

    def _read_between(self, pieces: list[Piece]) -> bool:
        """Skip what may stand around calls, and see what comes."""
        num_skipped = self._num_between()
        self._held += self._buffer[:num_skipped]
        text = self._buffer = self._buffer[num_skipped:]
        closing = self._syntax.closing
        if any(text != mark and mark.startswith(text) for mark in (closing, self._syntax.opening)):
            return False
        if self._has_called and closing and text.startswith(closing):
            self._buffer, self._held = text[len(closing) :], ""
            self._state = _State.TEXT
        elif (reader := self._new_reader(text[0])) is not None:
            self._reader, self._state = reader, _State.CALL
        else:
            if not self._has_called:
                self._write(pieces, self._held)
            self._held = ""
            self._state = _State.TEXT
        return True

    def _num_between(self) -> int:
        """Count the characters around calls that the buffer begins with; marks are none."""
        opening = self._syntax.opening
        for position, char in enumerate(self._buffer):
            is_skipped = char in _SPACE or char in self._syntax.separators
            if not is_skipped or opening.startswith(self._buffer[position:][: len(opening)]):
                return position
        return len(self._buffer)

    def _new_reader(self, char: str) -> CallReader | None:
        if self._num_calls == self._max_calls:
            return None
        if char == "{":
            return JsonCallReader(self._names, self._new_id)
        may_be_named = self._syntax.has_named_calls and not self._has_called
        if may_be_named and (char.isalnum() or char == "_"):
            return NamedCallReader(self._names, self._new_id)
        return None

    def _read_call(self, pieces: list[Piece]) -> bool:
        assert self._reader is not None
        reader = self._reader
        was_call = reader.is_call
        found, self._buffer = reader.push(self._buffer)
        if reader.is_call and not was_call:
            self._num_calls += 1
            self._held = self._space = ""
            self._has_called = self._is_fresh = True
        pieces += found
        if not reader.is_complete:
            return False
        self._reader = None
        if reader.is_call:
            self._state = _State.BETWEEN
        else:
            self._write(pieces, self._held + reader.raw)
            self._held = ""
            self._state = _State.TEXT
        return True

    def _write(self, pieces: list[Piece], text: str) -> None:
        """Add content, but hold back white space at its beginning."""
        if self._is_fresh:
            text = self._space + text
            self._space = ""
            if not text.strip():
                self._space = text
                return
            self._is_fresh = False
            if self._num_calls:
                text = text.lstrip()
        if text:
            pieces.append(Content(text))


def held_len(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that begins `mark`, not all of it."""
    start = text.find(mark[0], max(0, len(text) - len(mark) + 1))
    while start >= 0:
        if mark.startswith(text[start:]):
            return len(text) - start
        start = text.find(mark[0], start + 1)
    return 0
