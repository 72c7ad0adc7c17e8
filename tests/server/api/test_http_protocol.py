from __future__ import annotations

import asyncio
import contextlib
import threading

import h11
import pytest
import uvicorn

from loraplex_server.api.http_protocol import HttpProtocol, StreamConnection
from tests.server.api.conftest import wait_until

PARTS = (b"a", b"", b"bc" * 5000)


async def echo(scope, receive, send):
    """Answer with the body, in parts; by content-length where the path says so."""
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message["more_body"]:
            break
    parts = (*PARTS, body)
    headers = [(b"content-length", b"%d" % len(b"".join(parts)))]
    headers = headers if scope["path"] == "/length" else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture(scope="module")
def address():
    config = uvicorn.Config(
        echo, port=0, http=HttpProtocol, lifespan="off", log_level="error", ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


async def ask(address, *requests: bytes) -> list[tuple[int, bytes]]:
    """Send requests over one connection; return statuses and bodies as h11's client reads them."""
    reader, writer = await asyncio.open_connection(*address)
    answers = []
    for request in requests:
        client = h11.Connection(h11.CLIENT)
        method, path, _ = request.split(b" ", 2)
        client.send(h11.Request(method=method, target=path, headers=[(b"host", b"a")]))
        client.send(h11.EndOfMessage())
        writer.write(request)
        status, body = 0, b""
        async with asyncio.timeout(20):
            while not isinstance(event := client.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    client.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.ConnectionClosed):
                    break
        answers.append((status, body))
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return answers


def post(path: str, *headers: str, body: str = "hello") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: a", f"content-length: {len(body)}", *headers]
    return ("\r\n".join(lines) + f"\r\n\r\n{body}").encode()


async def test_streams_and_other_answers_follow_each_other_on_one_connection(address):
    whole = b"".join(PARTS) + b"hello"
    requests = [post("/stream"), post("/length"), post("/stream"), post("/stream")]
    assert await ask(address, *requests) == [(200, whole)] * 4


async def test_an_answer_without_chunks_has_none(address):
    """HTTP/1.0 knows none, and the answer to HEAD has no body."""
    head = b"HEAD /stream HTTP/1.1\r\nhost: a\r\n\r\n"
    whole = b"".join(PARTS)
    assert await ask(address, head, post("/stream")) == [(200, b""), (200, whole + b"hello")]
    assert await ask(address, b"GET /stream HTTP/1.0\r\nhost: a\r\n\r\n") == [(200, whole)]


async def test_a_request_that_offers_an_upgrade_keeps_its_body(address):
    offer = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAEAAEAAAAI")
    assert await ask(address, post("/stream", *offer)) == [(200, b"".join(PARTS) + b"hello")]


async def test_headers_without_end_are_refused(address):
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * (1 << 20))
    answer = b"HTTP/1.1 400 "
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionError):  # it was closed with much of this unread
            answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def test_a_chunk_out_of_turn_is_refused_as_h11_refuses_it():
    with pytest.raises(h11.LocalProtocolError):
        StreamConnection().send(h11.Data(data=b"early"))
