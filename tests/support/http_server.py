"""A real HTTP/1.1 server on a free port, answering what a function says. For client tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True)
class Received:
    """One request. `path` is still percent-encoded; `query` is decoded."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """One response: JSON, or `pieces` sent one by one as the iterable yields them."""

    body: object = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pieces: Iterable[bytes] | None = None


@dataclass
class RunningServer:
    """Where a server listens, and what it received so far."""

    url: str
    requests: list[Received] = field(default_factory=list)


@contextmanager
def serve(answer: Callable[[Received], Reply]) -> Iterator[RunningServer]:
    """Run a server in threads until the block ends."""
    with serve_with(_handler(answer)) as http:
        http.running = RunningServer(url_of(http))
        yield http.running


def url_of(http: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{http.server_port}"


@contextmanager
def serve_with(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    """Run a server of `http.server`'s own kind of handler in threads until the block ends."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield http
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def _handler(answer: Callable[[Received], Reply]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            received = Received(self.command, url.path, dict(parse_qsl(url.query)), headers, body)
            self.server.running.requests.append(received)
            self._write(answer(received))

        do_GET = do_POST = do_DELETE = do_PATCH = handle_any  # noqa: N815 - as http.server calls them

        def _write(self, reply: Reply) -> None:
            pieces = reply.pieces
            if pieces is None:
                pieces = [json.dumps(reply.body).encode()]
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for piece in pieces:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
            except ConnectionError:
                self.close_connection = True  # the client left: that is what some tests do

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    return Handler
