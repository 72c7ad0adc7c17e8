"""A streamed answer: an iterator of chunks that closes its response whatever happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType
from typing import Generic, Self

import httpx

from loraplex.chunk_reader import ChunkReader, ChunkT, broken_stream
from loraplex.types import Usage


class AsyncStream(Generic[ChunkT]):
    """Chunks of one answer, for `async for` and `async with`. One reader at a time.

    Use it in an `async with`, or iterate it to its end: both give the connection back. Leaving
    earlier closes it, and the server stops generating.
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
        # Read on after [DONE], to the end of the response: only then can its connection serve
        # the next request. A failure that late costs nobody anything.
        try:
            async for data in self.response.aiter_bytes():
                for chunk in self._reader.feed(data):
                    yield chunk
            self._reader.finish()
        except httpx.RequestError as error:
            if not self._reader.is_done:
                raise broken_stream(error) from error
        finally:
            await self.response.aclose()
