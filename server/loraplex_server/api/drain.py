"""The way out of a server: which requests are still taken, and when the last of them has ended.

Three states, each entered once: open; draining, where everything is served but `/ready` says no and
connections are not kept; closed, where work is refused. Work is what changes or computes something,
so every method but those that only read: a new endpoint is counted without being named here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.error_table import error_response
from loraplex_server.api.errors import ServerStopping

_READING_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_CLOSE: Final = (b"connection", b"close")


class Drain:
    """Used from the event loop; `DrainGate` counts for it."""

    def __init__(self) -> None:
        self._is_draining = self._is_closed = False
        self._num_working = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def is_draining(self) -> bool:
        """The server is about to end, or refuses work already."""
        return self._is_draining

    @property
    def is_closed(self) -> bool:
        """New work is refused."""
        return self._is_closed

    @property
    def num_working(self) -> int:
        """Requests for work that were let in and whose answers are not written yet."""
        return self._num_working

    def begin(self) -> None:
        """Tell whoever asks that the server is about to end. Idempotent."""
        self._is_draining = True

    def close(self) -> None:
        """Refuse new work. Idempotent."""
        self._is_draining = self._is_closed = True

    def enter(self) -> None:
        """A request for work was let in."""
        self._num_working += 1
        self._is_idle.clear()

    def leave(self) -> None:
        """Its answer is written, or nobody wants it any more."""
        self._num_working -= 1
        if not self._num_working:
            self._is_idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nobody works, so long at most; return whether that is so."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            return False
        return True


class DrainGate:
    """ASGI middleware: refuses work when the drain is closed, before any of the body is read."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        drain = self._drain

        def send_last(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start" and drain.is_draining:
                # Or clients would send the next request here, and not where it is wanted.
                message["headers"] = [*message.get("headers", ()), _CLOSE]
            return send(message)

        if scope["method"] in _READING_METHODS:
            await self._app(scope, receive, send_last)
        elif drain.is_closed:
            await _refuse(scope, receive, send_last)
        else:
            drain.enter()
            try:
                await self._app(scope, receive, send_last)
            finally:
                drain.leave()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    error = ServerStopping("the server is stopping and takes no new requests; ask another one")
    await error_response(error, scope["path"])(scope, receive, send)
