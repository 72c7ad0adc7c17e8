"""Replies on their way from the engine process to the API process: both ends of one socket.

The engine's steps must not wait for an API process that is busy, and the API's event loop must not
be woken more than once a step. So one end never blocks while there is work, and keeps what the
socket does not take; the other reads in the event loop itself, where a thread of its own would
fight it for the interpreter's lock. Each reply is its pickle behind the pickle's length.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import struct
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Final

from loraplex_server.engine.messages import Reply

_LENGTH: Final = struct.Struct("!Q")
_READ_BYTES: Final = 1 << 18


class ReplySender:
    """Owned by the thread that steps the engine.

    What is kept for an API process that does not read is bounded by what its requests may still
    be answered: no new ones come from it.
    """

    def __init__(self, connection: Connection) -> None:
        """Send over a connection that others may go on receiving from."""
        self._socket = _socket_of(connection)
        self._unsent = bytearray()

    def send(self, reply: Reply) -> None:
        """Send as much as can be sent at once, and keep the rest for the next call of any kind.

        Raises:
            BrokenPipeError, ConnectionResetError: nobody is there any more.
        """
        pickled = pickle.dumps(reply, pickle.HIGHEST_PROTOCOL)
        self._unsent += _LENGTH.pack(len(pickled))
        self._unsent += pickled
        self.push()

    def push(self) -> None:
        """Send what is left of earlier calls as far as that needs no waiting; raises as `send`."""
        while self._unsent:
            try:
                num_sent = self._socket.send(self._unsent, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            del self._unsent[:num_sent]

    def flush(self) -> None:
        """Send all that is left, waiting for the other end; raises as `send`."""
        if self._unsent:
            self._socket.sendall(self._unsent)
            self._unsent.clear()

    def close(self) -> None:
        """Send nothing more; the other end meets the pipe's end once the connection is closed."""
        self._socket.close()


class ReplyReceiver:
    """Used from one event loop, in which it calls back.

    Args:
        on_end: called once, after the last reply: the other end is closed.
    """

    def __init__(
        self,
        connection: Connection,
        on_reply: Callable[[Reply], None],
        on_end: Callable[[], None],
    ) -> None:
        self._socket = _socket_of(connection)
        self._on_reply = on_reply
        self._on_end = on_end
        self._unread = bytearray()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._read)

    def close(self) -> None:
        """Receive nothing more. Idempotent."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _read(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            self._on_end()
            return
        self._unread += data
        for reply in self._take_complete():
            self._on_reply(reply)

    def _take_complete(self) -> list[Reply]:
        replies: list[Reply] = []
        start = 0
        with memoryview(self._unread) as unread:
            while start + _LENGTH.size <= len(unread):
                body = start + _LENGTH.size
                end = body + _LENGTH.unpack_from(unread, start)[0]
                if end > len(unread):
                    break
                replies.append(pickle.loads(unread[body:end]))
                start = end
        del self._unread[:start]
        return replies


def _socket_of(connection: Connection) -> socket.socket:
    """Return a socket of its own for the same pipe; blocking calls on the connection stay so."""
    return socket.socket(fileno=os.dup(connection.fileno()))
