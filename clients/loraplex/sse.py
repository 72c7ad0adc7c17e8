"""Server-sent events, decoded from bytes that may be split anywhere.

Follows the WHATWG algorithm ("9.2.6 Interpreting an event stream"): lines end in LF, CR or CRLF, a
blank line ends an event, a line starting with ":" is a comment, several `data` lines are joined
by LF, and an event cut off by the end of the stream is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

_BOM = b"\xef\xbb\xbf"


class SSEDecoder:
    """Turns chunks of bytes into the `data` of each event. Owned by one stream.

    Only `data` fields are kept: the OpenAI protocol uses no event names, ids or retry times.
    """

    def __init__(self) -> None:
        self._tail = b""  # an unfinished line
        self._data: list[str] = []  # of the unfinished event
        self._is_at_start = True
        self._was_cr = False  # the last chunk ended in CR: an LF that follows belongs to it

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Yield the data of every event that this chunk completes."""
        for line in self._lines(chunk):
            if line:
                self._take(line)
            elif self._data:
                data, self._data = "\n".join(self._data), []
                yield data

    def _lines(self, chunk: bytes) -> list[bytes]:
        """Return the lines that this chunk completes, without their ends."""
        if self._was_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._was_cr = False
        buffered = self._tail + chunk
        if self._is_at_start:
            if len(buffered) < len(_BOM) and _BOM.startswith(buffered):
                self._tail = buffered
                return []
            buffered = buffered.removeprefix(_BOM)
            self._is_at_start = False
        lines = buffered.splitlines()  # on bytes: at LF, CR and CRLF only
        is_ended = buffered.endswith((b"\n", b"\r"))
        self._tail = b"" if is_ended or not lines else lines.pop()
        self._was_cr = self._was_cr or buffered.endswith(b"\r")
        return lines

    def _take(self, line: bytes) -> None:
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" ").decode("utf-8", errors="replace"))
