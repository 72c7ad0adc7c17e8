from __future__ import annotations

import json

import httpx
import pytest

from loraplex import AsyncClient, Client, InternalServerError, StreamError
from tests.support.http_server import Reply, serve


def event(text: str | None = None, index: int = 0, usage: dict | None = None) -> bytes:
    choices = [] if text is None else [{"index": index, "delta": {"content": text}}]
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return f"data: {json.dumps({**chunk, 'choices': choices, 'usage': usage})}\n\n".encode()


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
DONE = b"data: [DONE]\n\n"


def chat(client):
    return client.chat.create(model="m", messages=[], stream=True)


def streaming(body):
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=body, headers={"content-type": "text/event-stream"})

    return handler


async def test_chunks_arrive_however_the_bytes_are_split(on_client, make_pieces):
    whole = event("He") + event("llo") + event("other", index=1) + event(usage=USAGE) + DONE
    body = make_pieces(*(whole[i : i + 7] for i in range(0, len(whole), 7)))
    chunks = await on_client(streaming(body), chat)
    assert [chunk.text for chunk in chunks] == ["He", "llo", "", ""]
    assert chunks[-1].usage.completion_tokens == 2
    assert body.is_closed


async def test_the_request_asks_for_a_stream(on_client, make_pieces):
    seen = []

    def handler(request):
        seen.append(request)
        return httpx.Response(200, stream=make_pieces(DONE))

    await on_client(
        handler,
        lambda c: c.completions.create(
            model="m", prompt="p", stream=True, stream_options={"include_usage": True}
        ),
    )
    assert seen[0].headers["accept"] == "text/event-stream"
    assert json.loads(seen[0].content) == {
        "model": "m",
        "prompt": "p",
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("pieces", "error", "code"),
    [
        ([b'data: {"error": {"message": "out of pages", "code": "oom"}}\n\n'], None, "oom"),
        ([b'data: {"error": {"message": "out of pages", "code": "oom"}}\n\n', DONE], None, "oom"),
        ([], None, "incomplete"),
        ([b"data: not json\n\n"], None, "invalid_chunk"),
        ([b"data: []\n\n"], None, "invalid_chunk"),
        ([b'data: {"id": 1}\n\n'], None, "invalid_chunk"),
        ([], httpx.ReadError("reset"), "connection_lost"),
        ([], httpx.RemoteProtocolError(""), "connection_lost"),
        ([], httpx.ReadTimeout("slow"), "timeout"),
    ],
)
async def test_a_stream_that_breaks_off_says_why(pieces, error, code, on_client, make_pieces):
    body = make_pieces(event("first"), *pieces, error=error)
    with pytest.raises(StreamError) as caught:
        await on_client(streaming(body), chat)
    assert caught.value.code == code
    assert str(caught.value)
    assert body.is_closed


def test_what_came_before_the_failure_is_delivered(make_pieces):
    body = make_pieces(event("one") + b'data: {"error": {"message": "died"}}\n\n')
    with httpx.Client(transport=httpx.MockTransport(streaming(body))) as http:
        stream = chat(Client(http_client=http))
        assert next(stream).text == "one"
        with pytest.raises(StreamError, match="died"):
            next(stream)
        assert list(stream) == []


async def test_a_connection_that_breaks_after_done_is_no_failure(on_client, make_pieces):
    body = make_pieces(event("all"), DONE, error=httpx.ReadError("reset"))
    assert [chunk.text for chunk in await on_client(streaming(body), chat)] == ["all"]


async def test_an_error_status_is_raised_before_the_stream_begins(on_client):
    def handler(request):
        return httpx.Response(500, json={"error": {"message": "no engine"}})

    with pytest.raises(InternalServerError, match="no engine"):
        await on_client(handler, chat)


async def test_text_gives_the_pieces_of_the_first_choice(on_client, make_pieces):
    body = make_pieces(event("a") + event("", 0) + event("x", 1) + event("b") + DONE)

    def operation(client):
        stream = chat(client)
        if isinstance(client, Client):
            return list(stream.text)
        return _async_text(stream)

    assert await on_client(streaming(body), operation) == ["a", "b"]


async def _async_text(opening) -> list[str]:
    async with await opening as stream:
        return [piece async for piece in stream.text]


@pytest.mark.parametrize("num_read", [0, 1])
def test_leaving_early_closes_the_response(num_read, make_pieces):
    body = make_pieces(event("one"), event("two"), DONE)
    with httpx.Client(transport=httpx.MockTransport(streaming(body))) as http:
        with chat(Client(http_client=http)) as stream:
            for _ in range(num_read):
                next(stream)
            stream.close()
        assert body.is_closed
        assert list(stream) == []


async def test_leaving_an_async_stream_early_closes_the_response(make_pieces):
    body = make_pieces(event("one"), event("two"), DONE)
    async with httpx.AsyncClient(transport=httpx.MockTransport(streaming(body))) as http:
        async with await chat(AsyncClient(http_client=http)) as stream:
            async for chunk in stream:
                assert chunk.text == "one"
                break
        assert body.is_closed


def test_usage_is_known_at_the_end(make_pieces):
    body = make_pieces(event("one"), event(usage=USAGE), DONE)
    with httpx.Client(transport=httpx.MockTransport(streaming(body))) as http:
        stream = chat(Client(http_client=http))
        assert stream.usage is None
        list(stream)
        assert stream.usage.total_tokens == 5


def test_a_connection_serves_the_next_request_after_a_stream():
    peers = []

    def answer(received):
        peers.append(received)
        return Reply(pieces=[event("one"), event("two"), DONE])

    class Counting(httpx.HTTPTransport):
        def open_connections(self) -> int:
            return len(self._pool.connections)

    transport = Counting()
    with serve(answer) as server, httpx.Client(transport=transport) as http:
        client = Client(base_url=server.url, http_client=http)
        for _ in range(3):
            assert "".join(chat(client).text) == "onetwo"
            assert transport.open_connections() == 1
    assert len(peers) == 3


async def test_a_sample_rejected_in_the_middle_says_when_to_come_back(on_client, make_pieces):
    error = {"message": "later", "code": "overloaded", "retry_after_s": 2.4}
    body = make_pieces(event("He"), f"data: {json.dumps({'error': error})}\n\n".encode(), DONE)
    with pytest.raises(StreamError) as caught:
        await on_client(streaming(body), chat)
    assert (caught.value.code, caught.value.retry_after_s) == ("overloaded", 2.4)
