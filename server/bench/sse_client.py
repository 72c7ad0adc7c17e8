"""A light client of streams, in a process of its own: it only notes when text came.

Run by `bench_http`; prints one JSON line. HTTP libraries for Python would cost more per token than
the server that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path

from stub_engine import EmitLog

#: Milliseconds from a token's emission to its arrival are kept for tokens behind the first few,
#: when all streams have begun.
_FIRST = 25


@dataclass(frozen=True)
class Wish:
    """What each request asks for; `is_reused`: one connection for all requests of a worker."""

    port: int
    path: str
    body: dict[str, object]
    is_reused: bool = True


class Connection(asyncio.Protocol):
    """One connection; splits answers into events as they come."""

    def __init__(self) -> None:
        self._buffer = b""
        self._ended: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        #: Time in ns and number of tokens, of each event with text.
        self.arrivals: list[tuple[int, int]] = []
        self.failure = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    async def ask(self, wish: Wish, body: bytes) -> None:
        """Send a request and return when its answer has ended."""
        self._ended = asyncio.get_running_loop().create_future()
        self.arrivals = []
        assert self._transport is not None
        self._transport.write(
            f"POST {wish.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await self._ended

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            if line.startswith(b'data: {"'):
                text = _text(json.loads(line[6:]))
                if num_tokens := text.count(" "):
                    self.arrivals.append((now, num_tokens))
            elif line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                self.failure = line.decode()
        # The last chunk of a chunked body, or the end of a body that is no stream.
        if self._buffer == b"" and lines[-2:] == [b"0\r", b"\r"]:
            self._finish()
        elif self._buffer.startswith(b'{"') and self._buffer.endswith(b"}"):
            self._buffer = b""
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


def _text(event: dict[str, object]) -> str:
    if "error" in event:
        raise RuntimeError(str(event["error"]))
    choices = event["choices"]
    assert isinstance(choices, list)
    return "".join(choice.get("text") or choice["delta"].get("content", "") for choice in choices)


async def stream_all(wish: Wish, num_streams: int, log: EmitLog) -> dict[str, object]:
    """Open so many streams at once; return how late their tokens came."""
    late_ms: list[float] = []
    num_events = 0

    async def stream(row: int) -> None:
        nonlocal num_events
        connection = await _connect(wish)
        await connection.ask(wish, json.dumps(wish.body | {"prompt": [row, 5, 6, 7]}).encode())
        assert not connection.failure, connection.failure
        index = 0
        for now, num_tokens in connection.arrivals:
            for _ in range(num_tokens):
                if index >= _FIRST:
                    late_ms.append((now - log.emitted_ns(row, index)) / 1e6)
                index += 1
        num_events += len(connection.arrivals)
        assert index == wish.body["max_tokens"], f"{index} tokens came"
        connection.close()

    await asyncio.gather(*(stream(row) for row in range(num_streams)))
    late_ms.sort()
    num_tokens = num_streams * int(str(wish.body["max_tokens"]))
    return {
        "p50_ms": late_ms[len(late_ms) // 2],
        "p99_ms": late_ms[int(0.99 * len(late_ms))],
        "max_ms": late_ms[-1],
        "tokens_per_event": num_tokens / num_events,
    }


async def ask_all(wish: Wish, num_requests: int, num_workers: int) -> dict[str, object]:
    """Ask in a closed loop."""
    left = num_requests
    body = json.dumps(wish.body).encode()
    started = time.perf_counter()

    async def work() -> None:
        nonlocal left
        connection = await _connect(wish)
        while left > 0:
            left -= 1
            if not wish.is_reused:
                connection.close()
                connection = await _connect(wish)
            await connection.ask(wish, body)
            assert not connection.failure, connection.failure
        connection.close()

    await asyncio.gather(*(work() for _ in range(num_workers)))
    return {"wall_s": time.perf_counter() - started}


async def _connect(wish: Wish) -> Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", wish.port)
    return connection


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--wish", type=json.loads, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--streams", type=int)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args()
    wish = Wish(**options.wish)
    if options.streams:
        result = asyncio.run(stream_all(wish, options.streams, EmitLog(options.log)))
    else:
        result = asyncio.run(ask_all(wish, options.requests, options.workers))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
