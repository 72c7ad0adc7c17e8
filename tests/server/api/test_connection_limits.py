"""Peers that are slow, silent or too many, over sockets; every limit is short here."""

from __future__ import annotations

import asyncio
import functools
import json
import select
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from loraplex_server.api import http_protocol
from loraplex_server.api.connection_limits import ConnectionLimits
from loraplex_server.api.envelope import Envelope
from loraplex_server.api.http_protocol import HttpProtocol
from tests.server.api.conftest import BASE, wait_until

LIMITS = ConnectionLimits(max_connections=4, receive_timeout_s=0.5, send_timeout_s=2.0)
PIECE = b"x" * (1 << 16)
_END = 30.0


class Application:
    """Answers with 64 MiB on `/endless`, at once on `/early`, else when the body is there."""

    def __init__(self) -> None:
        self.num_gone = 0

    async def __call__(self, scope, receive, send):
        assert scope["type"] == "http"
        if scope["path"] == "/body":
            while (await receive())["more_body"]:
                pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/endless":
            watcher = asyncio.create_task(self._watch(receive))
            for _ in range(1024):
                await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            watcher.cancel()
        await send({"type": "http.response.body", "body": b"done"})

    async def _watch(self, receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.num_gone += 1


@pytest.fixture(scope="module")
def application():
    return Application()


@pytest.fixture(scope="module")
def server(application):
    config = uvicorn.Config(
        application,
        port=0,
        http=functools.partial(HttpProtocol, limits=LIMITS),
        ws="none",
        lifespan="off",
        log_level="error",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield server
    server.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture
def connect(server):
    opened = []

    def connect(receive_buffer: int = 0) -> socket.socket:
        peer = socket.socket()
        if receive_buffer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        peer.settimeout(_END)
        peer.connect(server.servers[0].sockets[0].getsockname())
        opened.append(peer)
        return peer

    yield connect
    for peer in opened:
        peer.close()
    wait_until(lambda: not server.server_state.connections)


def read_all(peer: socket.socket) -> tuple[int, dict]:
    """Read to the end of the connection; return the status and the error."""
    answer = b""
    while piece := peer.recv(65536):
        answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]


def test_headers_that_drip_are_ended_by_the_clock(connect):
    peer = connect()
    peer.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n")
    deadline = time.monotonic() + _END
    while not select.select([peer], [], [], LIMITS.receive_timeout_s / 5)[0]:
        assert time.monotonic() < deadline
        peer.sendall(b"x: y\r\n")  # each of these would keep a limit on silence from ending it
    status, error = read_all(peer)
    assert (status, error["code"]) == (408, "headers_timeout")


def test_a_connection_that_says_nothing_is_closed(connect):
    assert connect().recv(1) == b""


def test_a_kept_connection_that_begins_a_request_has_the_same_time(connect):
    peer = connect()
    peer.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    answer = b""
    while not answer.endswith(b"\r\n0\r\n\r\n"):
        answer += peer.recv(65536)
    peer.sendall(b"GET / HT")
    assert read_all(peer)[1]["code"] == "headers_timeout"


def test_headers_in_time_stop_the_clock(connect):
    peer = connect()
    peer.sendall(
        b"POST /body HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\nconnection: close\r\n\r\n"
    )
    time.sleep(2 * LIMITS.receive_timeout_s)  # the body has its own clock, not running here
    peer.sendall(b"x")
    assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_headers_without_end_are_told_so(connect):
    peer = connect()
    peer.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * (65 << 10))
    assert read_all(peer)[1]["code"] == "headers_too_large"


def test_what_is_not_http_is_told_so(connect):
    peer = connect()
    peer.sendall(b"\x16\x03\x01 hello\r\n\r\n")
    assert read_all(peer)[1]["code"] == "invalid_http"


def test_an_offer_of_web_sockets_is_a_plain_request(connect):
    peer = connect()
    offer = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: AAAA\r\n"
    peer.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n" + offer + b"sec-websocket-version: 13\r\n\r\n")
    assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_reader_that_takes_nothing_is_dropped(connect, application):
    peer = connect(receive_buffer=4096)
    peer.sendall(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n")
    before = application.num_gone
    wait_until(lambda: application.num_gone == before + 1, timeout_s=_END)


def test_a_slow_reader_is_waited_for(connect, application):
    peer = connect()
    peer.sendall(b"GET /endless HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    num_bytes, slow_until = 0, time.monotonic() + 1.5 * LIMITS.send_timeout_s
    while piece := peer.recv(len(PIECE)):
        num_bytes += len(piece)
        if time.monotonic() < slow_until:
            time.sleep(0.01)
    assert num_bytes > 1024 * len(PIECE)


def test_one_connection_too_many_is_told_to_come_back(connect, server):
    kept = [connect() for _ in range(LIMITS.max_connections)]
    for peer in kept:  # with its headers there, no clock runs for any of them
        peer.sendall(
            b"POST /body HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\nconnection: close\r\n\r\n"
        )
    wait_until(lambda: len(server.server_state.connections) == len(kept))
    surplus = connect()
    surplus.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    status, error = read_all(surplus)
    assert (status, error["code"]) == (503, "too_many_connections")
    assert error["retry_after_s"] == 1
    for peer in kept:
        peer.sendall(b"x")
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_the_rest_of_a_body_nobody_reads_is_not_read_for_ever(connect, monkeypatch):
    monkeypatch.setattr(http_protocol, "_LINGER_S", 0.3)
    peer = connect()
    peer.sendall(b"POST /early HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")

    def send_on() -> None:
        deadline = time.monotonic() + _END
        while time.monotonic() < deadline:
            peer.sendall(b"1\r\nx\r\n")
            time.sleep(0.02)

    with pytest.raises(ConnectionError):
        send_on()


# ---- bodies ---------------------------------------------------------------------------------


async def read_body(receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            return body


async def through_envelope(pieces, *, content_length: int | None = None, pause_s: float = 0.0):
    """Return what an application reads of a body whose pieces come at these intervals."""
    waiting = list(pieces)
    read: list[bytes] = []

    async def receive():
        await asyncio.sleep(pause_s)
        piece = waiting.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(waiting)}

    async def application(scope, receive, send):
        read.append(await read_body(receive))

    async def send(message):
        raise AssertionError("nothing is sent here")

    headers = [] if content_length is None else [(b"content-length", b"%d" % content_length)]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    await Envelope(application, receive_timeout_s=0.2)(scope, receive, send)
    return b"".join(read)


async def test_a_body_that_drips_is_ended_by_the_clock():
    with pytest.raises(Exception, match="comes too slowly") as caught:
        await through_envelope([b"x"] * 100, pause_s=0.05)
    assert caught.value.status_code == 408


async def test_a_body_that_takes_long_but_comes_steadily_is_read():
    pieces = [b"x" * 4096] * 8
    assert await through_envelope(pieces, pause_s=0.05) == b"".join(pieces)


async def test_a_body_announced_too_large_is_refused_before_any_of_it_is_read():
    with pytest.raises(Exception, match="larger than") as caught:
        await through_envelope([], content_length=9 << 20)
    assert caught.value.status_code == 413


async def test_a_body_of_chunks_is_refused_when_it_has_grown_too_large():
    with pytest.raises(Exception, match="larger than") as caught:
        await through_envelope([b"x" * (1 << 20)] * 20)
    assert caught.value.status_code == 413


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize("levels", [200, 500, 900, 5000, 1_000_000])
@pytest.mark.parametrize(
    "template",
    [
        b'{"model":"%b","prompt":@}',
        b'{"model":"%b","messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"a":@}}',
        b'{"model":"%b","messages":[{"role":"user","content":@}],"max_tokens":1}',
    ],
)
def test_deeply_nested_json_is_the_senders_error(shared_server, template, levels):
    path = "/v1/chat/completions" if b"messages" in template else "/v1/completions"
    body = (template % BASE.encode()).replace(b"@", deep(levels))
    headers = {"content-type": "application/json"}
    with shared_server.http() as http:
        answer = http.post(path, content=body, headers=headers)
        assert answer.status_code in {200, 400}, answer.text
        settings = http.patch("/v1/adapters/a", content=b'{"defaults":' + deep(levels) + b"}")
        assert settings.status_code == 400
        source = http.post("/v1/adapters", content=deep(levels), headers=headers)
        assert source.status_code == 400


def test_head_is_answered_wherever_get_is(shared_server):
    with httpx.Client(base_url=shared_server.url) as http:
        for path in ("/health", "/ready", "/ping", "/metrics", "/v1/models", f"/v1/models/{BASE}"):
            answer = http.head(path)
            assert (answer.status_code, answer.content) == (200, b"")
            assert answer.headers["content-type"] == http.get(path).headers["content-type"]
        assert http.head("/v1/completions").status_code == 405
