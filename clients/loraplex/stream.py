# Written by clients/generate_sync.py from async_stream.py: change that, and run it.
"""A streamed answer: an iterator of chunks that closes its response whatever happens."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Generic, Self

import httpx

from loraplex.chunk_reader import ChunkReader, ChunkT, broken_stream
from loraplex.types import Usage


class Stream(Generic[ChunkT]):
    """Chunks of one answer, for `for` and `with`. One reader at a time.

    Use it in a `with`, or iterate it to its end: both give the connection back. Leaving
    earlier closes it, and the server stops generating.
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
                raise broken_stream(error) from error
        finally:
            self.response.close()
