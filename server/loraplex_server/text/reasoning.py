"""The part of an answer in which a model reasons, `<think>...</think>`, apart from the rest."""

from __future__ import annotations

from typing import Final

from loraplex_server.text.tool_parser import held_len

OPENING: Final = "<think>"
CLOSING: Final = "</think>"


class ReasoningSplitter:
    """Splits one answer; white space around either part is dropped, and so are the marks."""

    def __init__(self, *, begins_inside: bool) -> None:
        """Prepare; the prompt ends inside of the reasoning where `begins_inside`."""
        self.is_inside = begins_inside
        self._is_over = False
        self._has_text = False  # of the part that is being read
        self._buffer = ""

    def push(self, text: str) -> tuple[str, str]:
        """Return what is certain now: of the reasoning, and of the rest."""
        self._buffer += text
        if not self.is_inside and not self._is_over:
            self._begin()
        if self.is_inside:
            return self._reason()
        return "", self._rest() if self._is_over else ""

    def flush(self) -> tuple[str, str]:
        """Return what was held back, at the end of the answer."""
        text, self._buffer = self._buffer, ""
        return (text.rstrip(), "") if self.is_inside else ("", text)

    def _begin(self) -> None:
        text = self._buffer.lstrip()
        if text.startswith(OPENING):
            self.is_inside = True
            self._buffer = text[len(OPENING) :]
        elif not OPENING.startswith(text):
            self._is_over = self._has_text = True

    def _reason(self) -> tuple[str, str]:
        if not self._has_text:
            self._buffer = self._buffer.lstrip()
        end = self._buffer.find(CLOSING)
        if end >= 0:
            thought = self._buffer[:end].rstrip()
            self._buffer = self._buffer[end + len(CLOSING) :]
            self.is_inside, self._is_over, self._has_text = False, True, False
            return thought, self._rest()
        end = len(self._buffer) - held_len(self._buffer, CLOSING)
        thought = self._buffer[:end].rstrip()
        self._buffer = self._buffer[len(thought) :]
        self._has_text = self._has_text or bool(thought)
        return thought, ""

    def _rest(self) -> str:
        text, self._buffer = self._buffer, ""
        if not self._has_text:
            text = text.lstrip()
            self._has_text = bool(text)
        return text
