"""One HTTP request whose answer is kept as it arrived, and read only when the run is over.

A load generator on the machine that it measures takes time from the server. So while a run lasts,
this does nothing for an arrival but to note the time and keep the bytes; undoing the chunked coding
and reading events is for afterwards. Each request has its own connection, which the server closes.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, cast


class ResponseError(Exception):
    """An answer that is no stream of tokens; the message says what came instead."""


@dataclass
class RecordedResponse:
    """What came back: pieces and when, in seconds since the connection was asked for."""

    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """Return the server-sent events and when each was complete.

        Raises:
            ResponseError: the status is not 200, or the stream brought an error or broke off.
        """
        status, is_chunked, body = self._split_head()
        if is_chunked:
            body = _dechunk(body)
        if status != 200:
            raise ResponseError(f"HTTP {status}: {_text(body)[:300]}")
        found, rest, is_done = [], b"", False
        for at_s, data in body:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"error:"):
                    raise ResponseError(line.decode(errors="replace")[:300])
                if not line.startswith(b"data:"):
                    continue
                text = line[5:].strip()
                if text == b"[DONE]":
                    is_done = True
                    continue
                event = json.loads(text)
                if "error" in event:
                    raise ResponseError(json.dumps(event["error"])[:300])
                found.append((at_s, event))
        if not is_done:
            raise ResponseError("the stream broke off")
        return found

    def json(self) -> Any:
        """Return the body of an answer that is no stream.

        Raises:
            ResponseError: the status is not 200.
        """
        status, is_chunked, body = self._split_head()
        text = _text(_dechunk(body) if is_chunked else body)
        if status != 200:
            raise ResponseError(f"HTTP {status}: {text[:300]}")
        try:
            return json.loads(text)
        except ValueError:
            return text

    def _split_head(self) -> tuple[int, bool, list[tuple[float, bytes]]]:
        """Return status, whether the body is chunked, and the body's pieces."""
        seen = b""
        for i, (at_s, data) in enumerate(self.pieces):
            seen += data
            head, end, first = seen.partition(b"\r\n\r\n")
            if end:
                lines = head.decode("latin1").lower().split("\r\n")
                is_chunked = any(
                    line.startswith("transfer-encoding:") and "chunked" in line for line in lines
                )
                return int(lines[0].split()[1]), is_chunked, [(at_s, first), *self.pieces[i + 1 :]]
        raise ResponseError("the connection closed without an answer")


def _dechunk(pieces: list[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """Undo the chunked transfer coding (RFC 9112, section 7.1); a chunk has the time of its end."""
    found, rest = [], b""
    for at_s, data in pieces:
        rest += data
        while True:
            size_text, newline, after = rest.partition(b"\r\n")
            if not newline:
                break
            size = int(size_text.split(b";")[0], 16)
            if len(after) < size + 2 or size == 0:
                break
            found.append((at_s, after[:size]))
            rest = after[size + 2 :]
    return found


def _text(pieces: list[tuple[float, bytes]]) -> str:
    return b"".join(data for _, data in pieces).decode(errors="replace")


class _Recorder(asyncio.Protocol):
    """Keeps all bytes of one connection with their times."""

    def __init__(self, request: bytes, started_s: float) -> None:
        self._request, self._started_s = request, started_s
        self.response = RecordedResponse()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self.response.pieces.append((time.perf_counter() - self._started_s, data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


def request_bytes(host: str, path: str, body: dict[str, Any] | None = None) -> bytes:
    """Return a POST of `body`, or a GET without one; the server is to close the connection."""
    data = b"" if body is None else json.dumps(body).encode()
    head = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {host}"]
    head += ["Connection: close", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*head, "", ""]).encode() + data


async def exchange(host: str, port: int, request: bytes, timeout_s: float) -> RecordedResponse:
    """Send one request and return its answer when the server has closed the connection.

    Raises:
        OSError: nobody listens.
        TimeoutError: the answer took longer than `timeout_s`.
    """
    loop = asyncio.get_running_loop()
    started_s = time.perf_counter()
    transport, recorder = await loop.create_connection(
        lambda: _Recorder(request, started_s), host, port
    )
    try:
        await asyncio.wait_for(recorder.closed, timeout_s)
    finally:
        transport.close()
    return recorder.response
