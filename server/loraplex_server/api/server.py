"""Serving the application on a socket until a signal, and stopping in order.

No new connections; running requests finish, up to `shutdown_grace_s`; then the engine ends what is
left, so that every stream gets its last event; then `serve` returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Final

import uvicorn

from loraplex_server.api.app import create_app
from loraplex_server.api.http_protocol import HttpProtocol
from loraplex_server.api.services import Services

log = logging.getLogger(__name__)

#: Streams that were told to end get so long to be written, after the grace period.
_LAST_WRITES_S: Final = 5
_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Server(uvicorn.Server):
    """One server over one set of services; a second signal ends it without grace."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._app = create_app(services)
        self._upkeep: asyncio.Task[None] | None = None
        self._grace: asyncio.Task[None] | None = None
        config = services.config
        super().__init__(
            uvicorn.Config(
                self._app,
                http=HttpProtocol,
                log_config=None,
                log_level="warning" if config.log_level == "info" else config.log_level,
                access_log=config.log_level == "debug",
                lifespan="off",
                timeout_graceful_shutdown=config.shutdown_grace_s + _LAST_WRITES_S,
            )
        )

    async def serve_until_signal(self, listener: socket.socket) -> None:
        """Serve on a bound socket; returns when everything has ended."""
        try:
            await self.serve(sockets=[listener])
        finally:
            if self._upkeep is not None:
                self._upkeep.cancel()
                await asyncio.wait([self._upkeep])
            await self._app.state.tenants.close()
        if self._grace is not None:
            self._grace.cancel()
            await asyncio.wait([self._grace])

    def stop(self) -> None:
        """Stop with grace, or without it if called again; from the event loop."""
        if self._grace is not None:
            self.force_exit = True
            return
        log.info("stopping; running requests may finish")
        self.should_exit = True
        self._grace = asyncio.create_task(self._end_after_grace())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, then say so."""
        await super().startup(sockets)
        self._upkeep = asyncio.create_task(self._app.state.upkeep.run())
        if self.started and sockets:
            sys.stdout.write(greeting(self._services, sockets[0]))
            sys.stdout.flush()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals in the event loop; uvicorn's way would raise them again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, self.stop)
        yield

    async def _end_after_grace(self) -> None:
        await asyncio.sleep(self._services.config.shutdown_grace_s)
        await self._services.engine.stop()


def greeting(services: Services, listener: socket.socket) -> str:
    """Return what to tell whoever started the server: that it is ready, and what to try."""
    host, port = listener.getsockname()[:2]
    host = _ANY_ADDRESS.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    info, model = services.engine.info, services.base_names[0]
    key = ' -H "authorization: Bearer $LORAPLEX_API_KEY"' if services.config.api_key else ""
    pool_mib = info.num_pages * info.page_bytes >> 20
    return (
        f"\nloraplex serves {model} at {url}\n"
        f"  {info.dtype} on {info.device}, {info.max_model_len} tokens of context, "
        f"a pool of {info.num_pages} pages ({pool_mib} MiB)\n"
        f"  try: curl {url}/v1/chat/completions -H 'content-type: application/json'{key} "
        f'-d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n'
        "  stop with Ctrl-C\n\n"
    )
