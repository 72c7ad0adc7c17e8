"""Replicas that answer with what they were asked, or badly: for what proxies make of either."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any


class Replica(ThreadingHTTPServer):
    """One of them; it says that it is ready, whatever its mood.

    Attributes:
        mood: "answers", "drains" (503), "breaks" off before it answers, "waits" for its end or
            "holds" its answer until `goes_on`.
        asked: paths of all requests so far, but for looks at `/ready`.
        body_began: set when the first byte of a body came.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mood = "answers"
        self.asked: list[str] = []
        self.ended, self.goes_on = Event(), Event()
        self.body_began = Event()
        self._connections: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A proxy may hang up whenever it likes."""

    def vanish(self) -> None:
        """Listen no more, and break off what there is."""
        self.ended.set()
        self.shutdown()
        self.server_close()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # already closed
                continue


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Replica

    def _answer(self) -> None:
        body = self._body()
        mood = "answers" if self.path == "/ready" else self.server.mood
        if self.path != "/ready":
            self.server.asked.append(self.path)
        if mood == "waits":
            self.server.ended.wait(60)
        if mood == "holds":
            self.server.goes_on.wait(60)
        if mood in ("waits", "breaks"):
            self.close_connection = True
            return
        found = self.headers
        headers = {name.lower(): ", ".join(found.get_all(name) or ()) for name in found}
        told = {"path": self.path, "headers": headers, "body": body.decode("latin1")}
        answer = json.dumps(told).encode()
        self.send_response(503 if mood == "drains" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            length = int(self.headers.get("content-length") or 0)
            return self._begun(1) + self.rfile.read(length - 1) if length else b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self._begun(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _begun(self, size: int) -> bytes:
        begin = self.rfile.read(size)
        self.server.body_began.set()
        return begin

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def running_replicas() -> Iterator[list[Replica]]:
    """Run three, until the block ends."""
    with ExitStack() as stack:
        replicas = [Replica() for _ in range(3)]
        for replica in replicas:
            Thread(target=replica.serve_forever, args=(0.02,), daemon=True).start()
            stack.callback(replica.vanish)
        yield replicas
