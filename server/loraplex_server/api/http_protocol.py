"""HTTP as uvicorn speaks it by h11, with a short way for the chunks of streams, and time limits.

h11 takes 15 us for each chunk, which is more than all else that a token costs in Python. httptools
would be as quick as this, but it loses the body of every request that offers an upgrade to HTTP/2,
as Java's client does by default, and bounds no header.

uvicorn waits for ever for the rest of a request's head, for a peer to take its answer, and for the
rest of a body that nobody wants any more; so time limits are here. Those of a body that somebody
reads are in `envelope`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from http import HTTPStatus
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from loraplex_server.api.connection_limits import ConnectionLimits
from loraplex_server.api.error_table import error_response
from loraplex_server.api.errors import (
    HeadersTimedOut,
    HeadersTooLarge,
    InvalidHttp,
    TooManyConnections,
)

log = logging.getLogger(__name__)

#: Of a request's first line and headers together.
_MAX_HEAD_BYTES: Final = 64 << 10
#: So long the rest of a body is still read after its answer, so that its sender reads that: a
#: connection that is closed with bytes unread is reset, and the answer lost.
_LINGER_S: Final = 5.0


class StreamConnection(h11.Connection):
    """A server's connection that writes chunks by itself: they change none of h11's state."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, _MAX_HEAD_BYTES)
        self._is_chunked = False
        self.is_head_too_large = False

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

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return what came; see `h11.Connection.next_event`."""
        try:
            return super().next_event()
        except h11.RemoteProtocolError as error:
            self.is_head_too_large = error.error_status_hint == 431
            raise


class HttpProtocol(H11Protocol):
    """One connection of uvicorn's; a partial of this with its `limits` is what uvicorn is given."""

    conn: StreamConnection

    def __init__(self, *args: Any, limits: ConnectionLimits | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = StreamConnection()
        self._limits = limits or ConnectionLimits()
        self._is_surplus = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A peer connected."""
        super().connection_made(transport)
        peer = transport.get_extra_info("socket")
        if isinstance(peer, socket.socket) or hasattr(peer, "setsockopt"):
            self._limits.set_options(peer)
        self._is_surplus = len(self.connections) > self._limits.max_connections
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, whoever ended it."""
        for timer in (self._head_timer, self._send_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The peer sent something."""
        if self._is_surplus:
            # Told now, not on connecting: bytes that nobody read would reset the connection.
            self._answer_and_close(
                TooManyConnections(
                    f"{self._limits.max_connections} connections are open already; close some, or "
                    "set max_connections"
                )
            )
            return
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """An answer was written."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and self._linger_timer is None:
            self._linger_timer = self.loop.call_later(_LINGER_S, self._end_linger)

    def pause_writing(self) -> None:
        """The peer takes its answer more slowly than it is written."""
        super().pause_writing()
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(self._limits.send_timeout_s, self._drop_reader)

    def resume_writing(self) -> None:
        """It has taken most of what there was."""
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; called by uvicorn."""
        if self.conn.is_head_too_large:
            limit = f"{_MAX_HEAD_BYTES} bytes"
            error: Exception = HeadersTooLarge(f"first line and headers have more than {limit}")
        else:
            error = InvalidHttp("what was sent is not a valid HTTP/1.1 request")
        self._answer_and_close(error)

    def _should_upgrade(self) -> bool:
        """No endpoint has another protocol, and the offer is no reason for a warning."""
        return False

    def _watch_head(self) -> None:
        """Bound the time for a head that is not complete; nothing of it restarts the clock."""
        if self.conn.their_state is not h11.IDLE:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            timeout_s = self._limits.receive_timeout_s
            self._head_timer = self.loop.call_later(timeout_s, self._end_head)

    def _end_head(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            limit = f"{self._limits.receive_timeout_s:g} s"
            self._answer_and_close(HeadersTimedOut(f"the headers were not complete after {limit}"))
        else:
            self.transport.close()

    def _end_linger(self) -> None:
        self._linger_timer = None
        if self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            self.transport.abort()

    def _drop_reader(self) -> None:
        limit = self._limits.send_timeout_s
        log.warning("dropped a client that took nothing of its answer for %g s", limit)
        self.transport.abort()

    def _answer_and_close(self, error: Exception) -> None:
        """Answer what no application sees, in the shape of every other error."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = error_response(error)
            events: list[h11.Event] = [
                h11.Response(
                    status_code=response.status_code,
                    headers=[*response.raw_headers, (b"connection", b"close")],
                    reason=HTTPStatus(response.status_code).phrase.encode(),
                ),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ]
            self.transport.write(b"".join([self.conn.send(event) or b"" for event in events]))
        self.transport.close()
