from __future__ import annotations

import asyncio
import contextlib

import pytest
from starlette.responses import PlainTextResponse

from loraplex_server.ray_serve.answer_pipe import answer_messages, whole_answer
from loraplex_server.ray_serve.forwarded import ForwardedRequest

REQUEST = ForwardedRequest({"type": "http", "method": "GET", "path": "/", "headers": []}, ())
START = {"type": "http.response.start", "status": 200, "headers": []}


def chunk(text, more=True):
    return {"type": "http.response.body", "body": text, "more_body": more}


async def test_what_is_sent_comes_before_the_next_is_written():
    step = asyncio.Event()

    async def app(scope, receive, send):
        await send(START)
        await send(chunk(b"a"))
        await step.wait()
        await send(chunk(b"b", more=False))

    async with contextlib.aclosing(answer_messages(app, REQUEST)) as answer:
        assert await anext(answer) == [START, chunk(b"a")]
        step.set()
        assert await anext(answer) == [chunk(b"b", more=False)]
        assert await anext(answer, None) is None


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_an_application_sees_that_nobody_reads_on(is_cancelled):
    seen = []

    async def app(scope, receive, send):
        await receive()
        await send(START)
        seen.append(await receive())
        await asyncio.sleep(0)  # what it still has to do
        seen.append("cleaned up")

    answer = answer_messages(app, REQUEST)
    await anext(answer)
    if is_cancelled:
        reading = asyncio.create_task(anext(answer))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    else:
        await answer.aclose()
    assert seen == [{"type": "http.disconnect"}, "cleaned up"]


async def test_a_failure_comes_after_what_was_sent():
    async def app(scope, receive, send):
        await send(START)
        raise ValueError("broken")

    answer = answer_messages(app, REQUEST)
    assert await anext(answer) == [START]
    with pytest.raises(ValueError, match="broken"):
        await anext(answer)


async def test_a_whole_answer_can_be_sent_with_another_body():
    answer = await whole_answer(PlainTextResponse("hello", 203), REQUEST)
    assert (answer.status, answer.body) == (203, b"hello")
    start, body = answer.messages(b"goodbye")
    assert (b"content-length", b"7") in start["headers"]
    assert body["body"] == b"goodbye"
