"""One HTTP request on its way from the front to a replica: plain data that pickles.

Small bodies travel with the request. Uploads go piece by piece into Ray's object store, which moves
them between machines and keeps them on disk when its memory is full, so neither side holds a whole
one in its own memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from starlette.types import Message, Receive, Scope

#: What may be in a front's own memory of one body.
PIECE_BYTES: Final = 4 << 20
#: Of an ASGI scope: what says something of the request. The rest is objects of the front's process.
_CARRIED: Final = (
    *("type", "asgi", "http_version", "method", "scheme"),
    *("path", "root_path", "query_string", "client"),
)


@dataclass(frozen=True)
class ForwardedRequest:
    """What a replica needs of a request.

    Attributes:
        scope: ASGI's, with paths below the application's own prefix.
        pieces: of the body, in order: the bytes themselves, or references to them.
    """

    scope: dict[str, Any]
    pieces: tuple[Any, ...]

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    @property
    def small_body(self) -> bytes:
        """The body, or nothing of one that is too large to name an adapter."""
        return self.pieces[0] if self.pieces and isinstance(self.pieces[0], bytes) else b""

    def body_reader(self, is_gone: asyncio.Event) -> Receive:
        """Return ASGI's `receive`; after the body it waits until the client `is_gone`."""
        pieces = list(self.pieces) or [b""]

        async def receive() -> Message:
            if not pieces:
                await is_gone.wait()
                return {"type": "http.disconnect"}
            piece = pieces.pop(0)
            body = piece if isinstance(piece, bytes) else await asyncio.wrap_future(piece.future())
            return {"type": "http.request", "body": body, "more_body": bool(pieces)}

        return receive


class ClientGone(Exception):
    """The client left before its request was complete."""


async def read_request(
    scope: Scope, receive: Receive, put: Callable[[bytes], Any]
) -> ForwardedRequest:
    """Read a request to its end.

    Args:
        put: places a piece of a large body in the object store and returns a reference to it.

    Raises:
        ClientGone
        HTTPException: whatever stands around `receive` finds it too large or too slow.
    """
    pieces: list[Any] = []
    buffer = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        buffer += message.get("body", b"")
        is_last = not message.get("more_body", False)
        if len(buffer) >= PIECE_BYTES or (is_last and pieces and buffer):
            pieces.append(put(bytes(buffer)))
            buffer.clear()
        if is_last:
            break
    return ForwardedRequest(_carried(scope), tuple(pieces) or (bytes(buffer),))


def below_prefix(scope: Scope) -> Scope:
    """Return a request's scope with its path below the application's own prefix."""
    if "path" not in scope:  # of the application's own start and end
        return scope
    root = scope.get("root_path", "")
    return {**scope, "path": scope["path"].removeprefix(root) or "/", "root_path": ""}


def _carried(scope: Scope) -> dict[str, Any]:
    carried = {name: scope[name] for name in _CARRIED if name in scope}
    headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    return {**carried, "headers": headers}
