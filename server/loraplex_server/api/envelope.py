"""What surrounds every request: its id, and a bound on bodies that are read into memory."""

from __future__ import annotations

import re
import secrets
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


class Envelope:
    """ASGI middleware; holds no state between requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID_HEADER, "")
        request_id = given if _USABLE_ID.fullmatch(given) else secrets.token_hex(16)
        scope[REQUEST_ID_KEY] = request_id
        REQUEST_ID.set(request_id)
        exchange = Exchange.of(scope)
        if exchange is not None:
            exchange.request_id = request_id
        header = (REQUEST_ID_HEADER.encode(), request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
                if exchange is not None:
                    exchange.begin_response(message)
            await send(message)

        bounded = receive if _is_upload(scope["path"], headers) else _bounded(receive)
        await self._app(scope, bounded, send_with_id)


def _is_upload(path: str, headers: Headers) -> bool:
    """Whether the body goes to the disk; JSON on the same paths is read into memory."""
    kind = headers.get("content-type", "").strip().lower()
    return path in _UPLOAD_PATHS and kind.startswith("multipart/form-data")


def _bounded(receive: Receive) -> Receive:
    num_bytes = 0

    async def receive_bounded() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        return message

    return receive_bounded
