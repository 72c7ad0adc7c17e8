"""A streamed answer: an iterator of chunks that closes its response whatever happens.

`ChunkReader` holds everything without I/O; `Stream` and `AsyncStream` only move bytes to it. Once
a stream has begun, every failure is a `StreamError`, and an end without `[DONE]` is one too: an
answer that was cut short is never taken for a whole one.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

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


class Stream(Generic[ChunkT]):
    """Chunks of one answer. Owned by one thread.

    Use it in a `with`, or iterate it to its end: both give the connection back. Leaving earlier
    closes it, and the server stops generating.
    """

    def __init__(self, response: httpx.Response, chunk_type: type[ChunkT]) -> None:
        self.response = response
        self._reader = ChunkReader(chunk_type)
        self._chunks = self._read()

    @property
    def text(self) -> Iterator[str]:
        """The pieces of text of the first choice, as they come."""
        return (chunk.text for chunk in self if chunk.text)

    @property
    def usage(self) -> Usage | None:
        """Token counts: None until the end, and without `stream_options.include_usage`."""
        return self._reader.usage

    def close(self) -> None:
        """Stop the answer and free the connection; safe to call twice."""
        self._chunks.close()
        self.response.close()

    def __iter__(self) -> Iterator[ChunkT]:
        return self

    def __next__(self) -> ChunkT:
        return next(self._chunks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> Generator[ChunkT, None, None]:
        # Read on after [DONE], to the end of the response: only then can its connection serve
        # the next request. A failure that late costs nobody anything.
        try:
            for data in self.response.iter_bytes():
                yield from self._reader.feed(data)
            self._reader.finish()
        except httpx.RequestError as error:
            if not self._reader.is_done:
                raise _broken(error) from error
        finally:
            self.response.close()


class AsyncStream(Generic[ChunkT]):
    """Chunks of one answer, for `async for` and `async with`. Owned by one task.

    See `Stream`.
    """

    def __init__(self, response: httpx.Response, chunk_type: type[ChunkT]) -> None:
        self.response = response
        self._reader = ChunkReader(chunk_type)
        self._chunks = self._read()

    @property
    def text(self) -> AsyncIterator[str]:
        """The pieces of text of the first choice, as they come."""
        return (chunk.text async for chunk in self if chunk.text)

    @property
    def usage(self) -> Usage | None:
        """Token counts: None until the end, and without `stream_options.include_usage`."""
        return self._reader.usage

    async def close(self) -> None:
        """Stop the answer and free the connection; safe to call twice."""
        await self._chunks.aclose()
        await self.response.aclose()

    def __aiter__(self) -> AsyncIterator[ChunkT]:
        return self

    async def __anext__(self) -> ChunkT:
        return await anext(self._chunks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _read(self) -> AsyncGenerator[ChunkT, None]:
        try:
            async for data in self.response.aiter_bytes():
                for chunk in self._reader.feed(data):
                    yield chunk
            self._reader.finish()
        except httpx.RequestError as error:
            if not self._reader.is_done:
                raise _broken(error) from error
        finally:
            await self.response.aclose()


def _broken(error: httpx.RequestError) -> StreamError:
    if isinstance(error, httpx.TimeoutException):
        return _stream_error("timeout", "the server went silent in the middle of the answer")
    reason = str(error) or type(error).__name__
    return _stream_error("connection_lost", f"the connection broke during the answer: {reason}")


def _stream_error(code: str, message: str) -> StreamError:
    return StreamError(ErrorDetail(message, type="stream_error", code=code))
