"""A multipart/form-data body (RFC 7578) that is read from disk while it is sent.

At most one block of a file is in memory. The length is known before the first byte, so the server
can refuse an upload that is too large without reading it, and progress has a total.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from loraplex.adapter_files import FilePart
from loraplex.errors import AdapterFilesError

BLOCK_BYTES = 256 * 1024

Progress: TypeAlias = Callable[[int, int], object]
"""Called with (bytes sent, bytes in total); from 0 again when the upload is retried."""


class MultipartBody:
    """One adapter upload: the fields in order, then the files. Can be sent any number of times.

    Attributes:
        content_type: Of the request; holds the boundary.
        content_length: Of the request, in bytes.
    """

    def __init__(
        self,
        fields: Mapping[str, str],
        parts: Sequence[FilePart],
        on_progress: Progress | None = None,
    ) -> None:
        boundary = f"loraplex-{secrets.token_hex(16)}"
        self._parts = [(_part_head(boundary, part), part) for part in parts]
        self._start = b"".join(_field_part(boundary, *field) for field in fields.items())
        self._end = f"--{boundary}--\r\n".encode()
        self._on_progress = on_progress or (lambda sent_bytes, total_bytes: None)
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self.content_length = (
            len(self._start)
            + sum(len(head) + part.size_bytes + len(b"\r\n") for head, part in self._parts)
            + len(self._end)
        )

    def stream(self) -> Iterator[bytes]:
        """Yield the body, telling the progress callback about each block once it is sent."""
        sent_bytes = 0
        self._on_progress(0, self.content_length)
        for block in self._blocks():
            yield block
            sent_bytes += len(block)
            self._on_progress(sent_bytes, self.content_length)

    async def astream(self) -> AsyncIterator[bytes]:
        """The same, reading in a worker thread; the callback runs in the event loop."""
        sent_bytes = 0
        self._on_progress(0, self.content_length)
        # Never closed by hand: after a cancellation the thread may still be inside it. The file
        # is closed with the generator, when the thread lets go of it.
        blocks = self._blocks()
        while (block := await asyncio.to_thread(next, blocks, None)) is not None:
            yield block
            sent_bytes += len(block)
            self._on_progress(sent_bytes, self.content_length)

    def _blocks(self) -> Iterator[bytes]:
        yield self._start
        for head, part in self._parts:
            yield head
            yield from _read_blocks(part)
            yield b"\r\n"
        yield self._end


def _field_part(boundary: str, field: str, value: str) -> bytes:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n'
    return f"{head}{value}\r\n".encode()


def _part_head(boundary: str, part: FilePart) -> bytes:
    filename = part.filename.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
    head = (
        f"--{boundary}\r\n"
        f'Content-Disposition: form-data; name="{part.field}"; filename="{filename}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return head.encode("utf-8", errors="surrogateescape")


def _read_blocks(part: FilePart) -> Iterator[bytes]:
    """Yield exactly `part.size_bytes` of the file, which was promised in the length."""
    left_bytes = part.size_bytes
    try:
        with part.path.open("rb") as file:
            while left_bytes:
                block = file.read(min(BLOCK_BYTES, left_bytes))
                if not block:
                    raise AdapterFilesError(part.path, "got shorter while it was being sent")
                left_bytes -= len(block)
                yield block
    except OSError as error:
        raise AdapterFilesError(part.path, error.strerror or str(error)) from error
