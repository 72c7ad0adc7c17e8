from __future__ import annotations

import asyncio
import pickle
from concurrent.futures import Future

import pytest

from loraplex_server.ray_serve.forwarded import (
    PIECE_BYTES,
    ClientGone,
    below_prefix,
    read_request,
)


class Stored:
    """What Ray's object store gives for a piece: a reference with a future of its bytes."""

    def __init__(self, piece):
        self.piece = piece

    def future(self):
        future = Future()
        future.set_result(self.piece)
        return future


def scope(**fields):
    known = {"type": "http", "method": "POST", "path": "/v1/adapters", "headers": [[b"a", b"b"]]}
    return known | {"query_string": b"x=1", "app": lambda: None, "state": {}} | fields


def receiving(*chunks, ends=True):
    messages = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    last = {"type": "http.request", "body": b"", "more_body": False}
    messages.append(last if ends else {"type": "http.disconnect"})

    async def receive():
        return messages.pop(0)

    return receive


async def body_of(request):
    receive, body = request.body_reader(asyncio.Event()), b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            return body


async def test_a_small_body_travels_with_its_request_which_pickles():
    request = await read_request(scope(), receiving(b"ab", b"cd"), Stored)
    again = pickle.loads(pickle.dumps(request))
    assert again == request
    assert request.small_body == b"abcd"
    assert await body_of(request) == b"abcd"


async def test_a_large_body_is_stored_in_pieces_and_read_in_order():
    chunks = [bytes([number]) * (3 << 20) for number in range(5)]
    request = await read_request(scope(), receiving(*chunks), Stored)
    assert request.small_body == b""
    assert [type(piece) for piece in request.pieces] == [Stored] * 3
    assert max(len(piece.piece) for piece in request.pieces) < PIECE_BYTES + (3 << 20)
    assert await body_of(request) == b"".join(chunks)


def test_paths_are_those_below_the_applications_prefix():
    below = below_prefix(scope(path="/llm/v1/models", root_path="/llm"))
    assert (below["path"], below["root_path"]) == ("/v1/models", "")
    assert below_prefix({"type": "lifespan"}) == {"type": "lifespan"}


async def test_a_client_that_leaves_while_it_sends_is_told_apart():
    with pytest.raises(ClientGone):
        await read_request(scope(), receiving(b"ab", ends=False), Stored)


async def test_after_the_body_the_reader_waits_for_the_client_to_leave():
    request = await read_request(scope(), receiving(b"ab"), Stored)
    is_gone = asyncio.Event()
    receive = request.body_reader(is_gone)
    assert (await receive())["more_body"] is False
    waiting = asyncio.create_task(receive())
    await asyncio.sleep(0)
    assert not waiting.done()
    is_gone.set()
    assert await waiting == {"type": "http.disconnect"}
