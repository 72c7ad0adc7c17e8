"""Serving the application on a socket until a signal, and stopping in order.

After the signal the server goes on listening, and says by `/ready` that it is about to end. For
`drain_delay_s` it serves as before, while load balancers notice. Then new work is refused; what was
accepted finishes, up to `shutdown_grace_s`; then the engine ends what is left, so that every stream
gets its last event; then the listener closes and `serve_until_signal` returns. See decision 24.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Final

import uvicorn

from loraplex_server.api.app import create_app, running
from loraplex_server.api.connection_limits import ConnectionLimits
from loraplex_server.api.drain import Drain
from loraplex_server.api.http_protocol import HttpProtocol
from loraplex_server.api.last_writes import LAST_WRITES_S, in_last_writes_time
from loraplex_server.api.services import Services
from loraplex_server.config import Config

log = logging.getLogger(__name__)

#: Longer than clients and balancers keep idle connections (httpx 5 s, AWS 60 s): whoever closes
#: first must be the one who asks, or a request meets a closing connection.
_KEEP_ALIVE_S: Final = 75
_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Server(uvicorn.Server):
    """One server over one set of services; a second signal ends it without grace."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._app = create_app(services)
        # Now, as it takes a third of a second, which running streams would have to wait for.
        self._app.openapi()
        self._beside = contextlib.AsyncExitStack()
        self._stopping: asyncio.Task[None] | None = None
        self._drain: Drain = self._app.state.drain
        config = services.config
        super().__init__(
            uvicorn.Config(
                self._app,
                # By its type a class or a name; it is only called.
                http=functools.partial(HttpProtocol, limits=_limits(config)),  # type: ignore[arg-type]
                ws="none",
                timeout_keep_alive=_KEEP_ALIVE_S,
                log_config=None,
                log_level="warning" if config.log_level == "info" else config.log_level,
                access_log=config.log_level == "debug",
                lifespan="off",
                timeout_graceful_shutdown=LAST_WRITES_S,
            )
        )

    async def serve_until_signal(self, listener: socket.socket) -> None:
        """Serve on a bound socket; returns when everything has ended."""
        try:
            await self.serve(sockets=[listener])
        finally:
            await in_last_writes_time(self._beside.aclose())
            if self._stopping is not None:
                self._stopping.cancel()
                await asyncio.wait([self._stopping])

    def stop(self) -> None:
        """Stop with grace, or without it if called again; from the event loop."""
        if self._stopping is None:
            log.info("stopping; requests under way may finish")
            self._drain.begin()
            self._stopping = asyncio.create_task(self._stop_in_order())
        else:
            self._stop_at_once()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, then say so."""
        await super().startup(sockets)
        await self._beside.enter_async_context(running(self._app))
        if self.started and sockets:
            needs_key = await self._app.state.tenants.keys.is_on()
            sys.stdout.write(greeting(self._services, sockets[0], needs_key=needs_key))
            sys.stdout.flush()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals in the event loop; uvicorn's way would raise them again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, self.stop)
        yield

    async def _stop_in_order(self) -> None:
        config = self._services.config
        await asyncio.sleep(config.drain_delay_s)
        self._drain.close()
        if not await self._drain.wait_idle(config.shutdown_grace_s):
            log.warning(
                "%d requests are not answered after shutdown_grace_s of %d s; ending them",
                self._drain.num_working,
                config.shutdown_grace_s,
            )
        await self._services.engine.stop()
        if not await self._drain.wait_idle(LAST_WRITES_S):
            self._abort_connections()
        self.should_exit = True

    def _stop_at_once(self) -> None:
        log.warning("stopping at once; requests under way break off")
        self._drain.close()
        self.should_exit = self.force_exit = True
        self._abort_connections()

    def _abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _limits(config: Config) -> ConnectionLimits:
    return ConnectionLimits(
        max_connections=config.max_connections,
        receive_timeout_s=config.receive_timeout_s,
        send_timeout_s=config.send_timeout_s,
    )


def greeting(services: Services, listener: socket.socket, *, needs_key: bool) -> str:
    """Return what to tell whoever started the server: that it is ready, and what to try."""
    host, port = listener.getsockname()[:2]
    host = _ANY_ADDRESS.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    info, model = services.engine.info, services.base_names[0]
    key = ' -H "authorization: Bearer $LORAPLEX_API_KEY"' if needs_key else ""
    ask = "  requests need a key: export LORAPLEX_API_KEY=lp-...\n" if needs_key else ""
    pool_mib = info.num_pages * info.page_bytes >> 20
    return (
        f"\nloraplex serves {model} at {url}\n"
        f"  {info.dtype} on {info.device}, {info.max_model_len} tokens of context, "
        f"a pool of {info.num_pages} pages ({pool_mib} MiB)\n"
        f"{ask}"
        f"  try: curl {url}/v1/chat/completions -H 'content-type: application/json'{key} "
        f'-d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n'
        "  stop with Ctrl-C\n\n"
    )
