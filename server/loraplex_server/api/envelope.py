"""What surrounds every request: its id, HEAD as GET without a body, and bounds on what is sent.

A body that is read into memory is bounded by its size, and every body by the time that its sender
takes: `receive_timeout_s` and a second for each KiB, as mod_reqtimeout has it. A limit on silence
alone could be kept by sending a byte now and then.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable
from typing import Final

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.exchange import Exchange
from loraplex_server.logs import REQUEST_ID

REQUEST_ID_HEADER: Final = "x-request-id"
#: Where the request's id is in the ASGI scope.
REQUEST_ID_KEY: Final = "loraplex.request_id"

#: A million token ids, written out; uploads have their own limit.
MAX_BODY_BYTES: Final = 8 << 20
_UPLOAD_PATHS: Final = frozenset({"/v1/adapters", "/v1/adapters/validate"})
_USABLE_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


#: What a sender must manage beyond its first seconds.
_MIN_BYTES_PER_S: Final = 1024


class Envelope:
    """ASGI middleware; holds no state between requests."""

    def __init__(self, app: ASGIApp, receive_timeout_s: float) -> None:
        self._app = app
        self._receive_timeout_s = receive_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # The protocol below leaves the body out; every GET is there for probes that ask so.
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID_HEADER, "")
        request_id = given if _USABLE_ID.fullmatch(given) else secrets.token_hex(16)
        scope[REQUEST_ID_KEY] = request_id
        REQUEST_ID.set(request_id)
        exchange = Exchange.of(scope)
        if exchange is not None:
            exchange.request_id = request_id
        header = (REQUEST_ID_HEADER.encode(), request_id.encode())

        # No coroutine of its own, here and in the other layers: it runs for every chunk.
        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
                if exchange is not None:
                    exchange.begin_response(message)
            return send(message)

        body = _Body(receive, headers, self._receive_timeout_s)
        if not _is_upload(scope["path"], headers):
            body.max_bytes = MAX_BODY_BYTES
        await self._app(scope, body.receive, send_with_id)


def _is_upload(path: str, headers: Headers) -> bool:
    """Whether the body goes to the disk; JSON on the same paths is read into memory."""
    kind = headers.get("content-type", "").strip().lower()
    return path in _UPLOAD_PATHS and kind.startswith("multipart/form-data")


class _Body:
    """One request's body on its way in.

    Only the time spent here counts: while nobody asks for more, its sender is not to blame.
    """

    def __init__(self, receive: Receive, headers: Headers, timeout_s: float) -> None:
        self._receive = receive
        self._timeout_s = timeout_s
        self._content_length = int(headers.get("content-length", 0))  # h11 checked it
        self._num_bytes = 0
        self._waited_s = 0.0
        self._is_complete = False
        #: None where it does not go to memory.
        self.max_bytes: int | None = None

    async def receive(self) -> Message:
        """Return the next message; raises HTTPException when a bound is passed."""
        if self._is_complete:
            return await self._receive()
        self._check_size(self._content_length)
        message = await self._receive_in_time()
        self._num_bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        self._check_size(self._num_bytes)
        return message

    def _check_size(self, num_bytes: int) -> None:
        if self.max_bytes is not None and num_bytes > self.max_bytes:
            raise HTTPException(413, f"the body is larger than {self.max_bytes} bytes")

    async def _receive_in_time(self) -> Message:
        limit_s = self._timeout_s + self._num_bytes / _MIN_BYTES_PER_S
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        try:
            async with asyncio.timeout(limit_s - self._waited_s):
                return await self._receive()
        except TimeoutError:
            received = f"{self._num_bytes} bytes came in {limit_s:.0f} s"
            raise HTTPException(408, f"the body comes too slowly: {received}") from None
        finally:
            self._waited_s += loop.time() - started_s
