"""From the bytes of a stream to chunks, without I/O.

Once a stream has begun, every failure is a `StreamError`, and an end without `[DONE]` is one too:
an answer that was cut short is never taken for a whole one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import httpx
from pydantic import ValidationError

from loraplex.errors import ErrorDetail, StreamError, detail_from_json
from loraplex.sse import SSEDecoder
from loraplex.types import Answer, Usage

ChunkT = TypeVar("ChunkT", bound=Answer)


class ChunkReader(Generic[ChunkT]):
    """Turns the bytes of one stream into chunks.

    Attributes:
        is_done: `[DONE]` was seen; what follows is ignored.
        usage: The token counts, once a chunk carried them.
    """

    def __init__(self, chunk_type: type[ChunkT]) -> None:
        self._chunk_type = chunk_type
        self._decoder = SSEDecoder()
        self.is_done = False
        self.usage: Usage | None = None

    def feed(self, data: bytes) -> Iterator[ChunkT]:
        """Yield the chunks that these bytes complete.

        Raises:
            StreamError: The server reported a failure, or sent what is no chunk.
        """
        for event in self._decoder.feed(data):
            if self.is_done or not event:
                continue
            if event == "[DONE]":
                self.is_done = True
                continue
            chunk = self._parse(event)
            self.usage = chunk.usage or self.usage
            yield chunk

    def finish(self) -> None:
        """Check, at the end of the bytes, that the answer is whole."""
        if not self.is_done:
            raise _stream_error("incomplete", "the stream ended before the answer was complete")

    def _parse(self, event: str) -> ChunkT:
        try:
            body: Any = json.loads(event)
        except ValueError as error:
            raise _stream_error("invalid_chunk", f"not JSON: {event[:200]}") from error
        if isinstance(body, dict) and body.get("error"):
            raise StreamError(detail_from_json(body, fallback="the server broke off the stream"))
        try:
            return self._chunk_type.model_validate(body)
        except ValidationError as error:
            raise _stream_error("invalid_chunk", f"unexpected chunk: {event[:200]}") from error


def broken_stream(error: httpx.RequestError) -> StreamError:
    """Return what a connection that broke during the answer comes to."""
    if isinstance(error, httpx.TimeoutException):
        return _stream_error("timeout", "the server went silent in the middle of the answer")
    reason = str(error) or type(error).__name__
    return _stream_error("connection_lost", f"the connection broke during the answer: {reason}")


def _stream_error(code: str, message: str) -> StreamError:
    return StreamError(ErrorDetail(message, type="stream_error", code=code))
