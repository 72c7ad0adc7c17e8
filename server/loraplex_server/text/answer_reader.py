"""From an answer's text to its pieces: reasoning first, then content and calls of tools."""

from __future__ import annotations

from loraplex_server.text.reasoning import ReasoningSplitter
from loraplex_server.text.tool_parser import ToolParser
from loraplex_server.text.tool_pieces import Content, Piece, Reasoning


class AnswerReader:
    """Reads one sequence; not thread-safe. Either part may be missing."""

    def __init__(
        self,
        splitter: ReasoningSplitter | None = None,
        parser: ToolParser | None = None,
        *,
        drops_reasoning: bool = False,
    ) -> None:
        self._splitter = splitter
        self._parser = parser
        self._drops_reasoning = drops_reasoning

    def push(self, text: str, *, is_last: bool = False) -> list[Piece]:
        """Return what is certain now; everything once the text is over."""
        pieces: list[Piece] = []
        if self._splitter is not None:
            thought, text = self._splitter.push(text)
            if is_last:
                last_thought, last_text = self._splitter.flush()
                thought, text = thought + last_thought, text + last_text
            if thought and not self._drops_reasoning:
                pieces.append(Reasoning(thought))
        if self._parser is not None:
            pieces += self._parser.push(text)
            if is_last:
                pieces += self._parser.flush()
        elif text:
            pieces.append(Content(text))
        return pieces
