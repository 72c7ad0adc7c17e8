"""HTTP as uvicorn speaks it by h11, with a short way for the chunks of streams.

h11 takes 15 us for each chunk, which is more than all else that a token costs in Python. httptools
would be as quick as this, but it loses the body of every request that offers an upgrade to HTTP/2,
as Java's client does by default, and bounds no header.
"""

from __future__ import annotations

from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Of a request's first line and headers together.
_MAX_HEAD_BYTES: Final = 64 << 10


class StreamConnection(h11.Connection):
    """A server's connection that writes chunks by itself: they change none of h11's state."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, _MAX_HEAD_BYTES)
        self._is_chunked = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # no overloads
        """Return what to write for an event; see `h11.Connection.send`."""
        if self._is_chunked and type(event) is h11.Data and self.our_state is h11.SEND_BODY:
            data = event.data
            return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        written = super().send(event)
        if isinstance(event, h11.Response):
            # As it went out: h11 decides on it, by the request's method and version.
            self._is_chunked = b"\r\ntransfer-encoding: chunked\r\n" in (written or b"").lower()
        return written


class HttpProtocol(H11Protocol):
    """One connection of uvicorn's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = StreamConnection()
