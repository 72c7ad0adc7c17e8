"""One answer as its client has seen it so far, to end it properly when its replica cannot any more.

Ray tells nobody that a replica is about to be killed, so the last word is the front's. It may add
an event anywhere: the server writes whole events, and its last one with the end of the answer.
"""

from __future__ import annotations

import json
from typing import Any, Final

from starlette.types import Message

from loraplex_server.api.answer import OpenAIStreamEnd
from loraplex_server.api.error_table import error_body, shape_of
from loraplex_server.api.foreign_errors import foreign_error
from loraplex_server.api.json_text import compact

_CONTENT_TYPE: Final = b"content-type"
_KIND: Final = b"text/event-stream"


class EventStream:
    """Sees every message of an answer; holds the last piece of its body and nothing else.

    Args:
        path: of the request; it decides how the API that was called tells of errors.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._is_open = False
        self._last = b""

    @property
    def is_open(self) -> bool:
        """Whether events were promised and the last is still to come."""
        return self._is_open

    def see(self, message: Message) -> None:
        """Take note of a message that goes to the client."""
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self._is_open = headers.get(_CONTENT_TYPE, b"").startswith(_KIND)
        elif self._is_open:
            self._last = message.get("body", b"") or self._last
            self._is_open = message.get("more_body", False)

    def ending(self, error: Exception) -> Message:
        """Return the message that ends an open stream with the one event that says why."""
        return {"type": "http.response.body", "body": self._event(error)}

    def _event(self, error: Exception) -> bytes:
        shown = error_body(error)["error"]
        _, foreign = foreign_error(self._path, shape_of(type(error)).status, shown)
        if self._path == "/v1/messages":
            return f"event: error\ndata: {compact(foreign)}\n\n".encode()
        if self._path == "/generate_stream":
            return f"data:{compact(foreign)}\n\n".encode()
        if self._path == "/v1/responses":
            return self._response_event(shown)
        form = OpenAIStreamEnd()
        return form.stream_error(error) + form.stream_end

    def _response_event(self, shown: dict[str, Any]) -> bytes:
        """Without `response.failed`: what the response held is gone with its replica."""
        event = {name: shown[name] for name in ("code", "message", "param")}
        number = _last_number(self._last) + 1
        shape = {"type": "error", **event, "sequence_number": number}
        return f"event: error\ndata: {compact(shape)}\n\n".encode()


def _last_number(events: bytes) -> int:
    """Return which of a response's events came last; -1 where none did."""
    _, data, last = events.rpartition(b"\ndata: ")
    return int(json.loads(last)["sequence_number"]) if data else -1
