"""An ASGI application's answer as a stream of messages, for a caller in another process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final

from starlette.types import ASGIApp, Message

from loraplex_server.ray_serve.forwarded import ForwardedRequest

#: So long an application may take to end once its client has gone.
_LEAVING_S: Final = 10.0


async def answer_messages(
    app: ASGIApp, request: ForwardedRequest
) -> AsyncGenerator[list[Message], None]:
    """Yield what the application sends, whatever there is at once, as soon as there is any.

    Should the caller stop early, the application sees its client disconnect, as over a socket.
    What it raises is raised here, after what it sent.
    """
    sent: list[Message] = []
    news, is_gone = asyncio.Event(), asyncio.Event()

    async def send(message: Message) -> None:
        sent.append(message)
        news.set()

    async def run() -> None:
        await app(request.scope, request.body_reader(is_gone), send)

    running = asyncio.create_task(run())
    running.add_done_callback(lambda _: news.set())
    try:
        while not running.done() or sent:
            await news.wait()
            news.clear()
            if sent:
                messages = sent.copy()
                sent.clear()
                yield messages
        await running
    finally:
        is_gone.set()
        if not running.done():
            await asyncio.wait([running], timeout=_LEAVING_S)
            running.cancel()


@dataclass(frozen=True)
class WholeAnswer:
    """One that is complete; `headers` as ASGI has them."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def messages(self, body: bytes) -> tuple[Message, Message]:
        """Return it as messages, with another body."""
        length = (b"content-length", b"%d" % len(body))
        headers = [length if name == length[0] else (name, value) for name, value in self.headers]
        return (
            {"type": "http.response.start", "status": self.status, "headers": headers},
            {"type": "http.response.body", "body": body},
        )


async def whole_answer(app: ASGIApp, request: ForwardedRequest) -> WholeAnswer:
    """Return what the application answers, once it has ended."""
    messages = [message async for several in answer_messages(app, request) for message in several]
    start = messages[0]
    body = b"".join(message.get("body", b"") for message in messages[1:])
    return WholeAnswer(start["status"], tuple(start["headers"]), body)
