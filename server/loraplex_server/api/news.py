"""Waking the one task that waits for events."""

from __future__ import annotations

import asyncio


class News:
    """Used from one event loop, by one waiting task.

    Between finding nothing and waiting, that task must not give way, or it would sleep through what
    came meanwhile.
    """

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def tell(self) -> None:
        """Something came."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def wait(self) -> asyncio.Future[None]:
        """Return what to await until something has come since the call."""
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter
