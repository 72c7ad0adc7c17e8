"""What one connection may cost: bounds that keep slow and silent peers from holding the server."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final

#: A peer whose machine is gone is noticed after about a minute and a half without a packet.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 45, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 3}


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds of one server.

    Attributes:
        max_connections: open at once; more are told to come back.
        receive_timeout_s: for the first line and headers of a request.
        send_timeout_s: a peer that takes nothing of its answer for so long is dropped.
    """

    max_connections: int = 4096
    receive_timeout_s: float = 30.0
    send_timeout_s: float = 60.0

    def set_options(self, connection: socket.socket) -> None:
        """Have the kernel drop a peer that is gone, or takes nothing of what is left to send.

        The transport's own buffer tells of a slow reader only above its mark; what is below, or in
        the kernel, would be kept for such a peer for ever.
        """
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        values = {**_KEEPALIVE, "TCP_USER_TIMEOUT": int(self.send_timeout_s * 1000)}
        for name, value in values.items():
            if (option := getattr(socket, name, None)) is not None:  # not every system has all
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
