"""The content blocks of one Messages answer, and the events that tell of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from loraplex_server.text.tool_pieces import CallArguments, CallStart, Content, Piece, Reasoning

Event = dict[str, Any]


class OutputBlocks:
    """Grows with the answer; at most one block is open, the last.

    Attributes:
        content: all blocks, complete once they are closed.
    """

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._text = ""

    @property
    def has_calls(self) -> bool:
        return any(block["type"] == "tool_use" for block in self.content)

    def push(self, pieces: Iterable[Piece]) -> list[Event]:
        """Return the events that the next pieces make."""
        events: list[Event] = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                call = {"id": piece.call_id, "name": piece.name, "input": {}}
                events += self._begin({"type": "tool_use", **call})
            elif isinstance(piece, CallArguments):
                events.append(self._add("input_json_delta", "partial_json", piece.text))
            elif isinstance(piece, Reasoning):
                events += self._ensure({"type": "thinking", "thinking": "", "signature": ""})
                events.append(self._add("thinking_delta", "thinking", piece.text))
            elif isinstance(piece, Content):
                events += self._ensure({"type": "text", "text": "", "citations": None})
                events.append(self._add("text_delta", "text", piece.text))
        return events

    def close(self) -> list[Event]:
        """Return the event that ends the last block."""
        block = self._open
        if block is None:
            return []
        if block["type"] == "tool_use":
            block["input"] = _object_of(self._text)
        else:
            block[block["type"]] = self._text
        self._open = None
        return [{"type": "content_block_stop", "index": len(self.content) - 1}]

    def _ensure(self, block: dict[str, Any]) -> list[Event]:
        if self._open is not None and self._open["type"] == block["type"]:
            return []
        return self._begin(block)

    def _begin(self, block: dict[str, Any]) -> list[Event]:
        events = self.close()
        self._open, self._text = block, ""
        self.content.append(block)
        place = {"index": len(self.content) - 1}
        return [*events, {"type": "content_block_start", **place, "content_block": dict(block)}]

    def _add(self, kind: str, field: str, text: str) -> Event:
        self._text += text
        place = {"index": len(self.content) - 1}
        return {"type": "content_block_delta", **place, "delta": {"type": kind, field: text}}


def _object_of(arguments: str) -> dict[str, Any]:
    """Return arguments as an object, which this API insists on; broken ones under one key."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {"INVALID_JSON": arguments}
    assert isinstance(value, dict), "arguments begin with a brace"
    return value
