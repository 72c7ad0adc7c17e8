"""The output items of one response, and the events that tell of them while they are written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loraplex_server.api.ids import new_item_id
from loraplex_server.text.tool_pieces import CallArguments, CallStart, Content, Piece, Reasoning

Event = dict[str, Any]


class OutputItems:
    """Grows with the answer; at most one item is open, the last.

    Attributes:
        output: all items, as they are now.
    """

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._text = ""
        self._logprobs: list[Any] = []
        self._waiting_logprobs: list[Any] = []

    def push(self, pieces: Iterable[Piece], logprobs: list[Any] | None = None) -> list[Event]:
        """Return the events that the next pieces make.

        Args:
            logprobs: of the tokens behind these pieces; they go with the next text.
        """
        self._waiting_logprobs += logprobs or []
        events: list[Event] = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                events += self._begin(_function_call(piece))
            elif isinstance(piece, CallArguments):
                events.append(self._add("response.function_call_arguments.delta", piece.text))
            elif isinstance(piece, Reasoning):
                events += self._ensure("reasoning")
                events.append(self._add("response.reasoning_text.delta", piece.text))
            else:
                events += self._ensure("message")
                events.append(self._add_text(piece))
        return events

    def close(self, *, is_complete: bool) -> list[Event]:
        """Return the events that end the last item; without any there is an empty message.

        Args:
            is_complete: the answer was not cut off.
        """
        events = [] if self.output else self._ensure("message")
        return events + self._end("completed" if is_complete else "incomplete")

    @property
    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.output) - 1}

    def _ensure(self, kind: str) -> list[Event]:
        if self._open is not None and self._open["type"] == kind:
            return []
        return self._begin(_message() if kind == "message" else _reasoning())

    def _begin(self, item: dict[str, Any]) -> list[Event]:
        events = self._end("completed")
        self._open = item
        self.output.append(item)
        self._text, self._logprobs = "", []
        place = {"output_index": len(self.output) - 1}
        # The event has the item as it is now; it will change.
        events.append({"type": "response.output_item.added", **place, "item": dict(item)})
        if (part := self._part()) is not None:
            events.append(
                {"type": "response.content_part.added", **self._place, "content_index": 0}
                | {"part": part}
            )
        return events

    def _add(self, kind: str, text: str) -> Event:
        self._text += text
        is_call = kind == "response.function_call_arguments.delta"
        index = {} if is_call else {"content_index": 0}
        return {"type": kind, **self._place, **index, "delta": text}

    def _add_text(self, piece: Content) -> Event:
        logprobs, self._waiting_logprobs = self._waiting_logprobs, []
        self._logprobs += logprobs
        return {**self._add("response.output_text.delta", piece.text), "logprobs": logprobs}

    def _part(self) -> dict[str, Any] | None:
        """Return the content of the open item as it is now; calls have none."""
        assert self._open is not None
        if self._open["type"] == "message":
            part = {"type": "output_text", "annotations": [], "text": self._text}
            return {**part, "logprobs": self._logprobs}
        if self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": self._text}
        return None

    def _end(self, status: str) -> list[Event]:
        """Complete the open item, if there is one."""
        item = self._open
        if item is None:
            return []
        if item["type"] == "message":  # what came without text belongs to the text before
            self._logprobs += self._waiting_logprobs
            self._waiting_logprobs = []
        events: list[Event] = []
        part = self._part()
        if part is None:
            item["arguments"] = self._text
            done = {"arguments": self._text, "name": item["name"]}
            kind = "response.function_call_arguments.done"
            events.append({"type": kind, **self._place, **done})
        else:
            item["content"] = [part]
            name = "output_text" if item["type"] == "message" else "reasoning_text"
            place = {**self._place, "content_index": 0}
            logprobs = {"logprobs": self._logprobs} if item["type"] == "message" else {}
            done = {"type": f"response.{name}.done", **place, "text": self._text, **logprobs}
            events += [done, {"type": "response.content_part.done", **place, "part": part}]
        item["status"] = status
        place = {"output_index": len(self.output) - 1}
        events.append({"type": "response.output_item.done", **place, "item": item})
        self._open = None
        return events


def _message() -> dict[str, Any]:
    item = {"id": new_item_id("msg"), "type": "message", "status": "in_progress"}
    return {**item, "role": "assistant", "content": []}


def _reasoning() -> dict[str, Any]:
    item = {"id": new_item_id("rs"), "type": "reasoning", "status": "in_progress"}
    return {**item, "summary": [], "content": []}


def _function_call(start: CallStart) -> dict[str, Any]:
    item = {"id": new_item_id("fc"), "type": "function_call", "status": "in_progress"}
    return {**item, "call_id": start.call_id, "name": start.name, "arguments": ""}
