"""One HTTP request and its answer as they are observed: counted, logged and traced at the end.

The middleware stands around everything else and wraps nothing that is called per token: the
innermost thing that sees a response begin (`Envelope`) tells the exchange, which lies in the
request's scope.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.http_metrics import HttpMetrics
from loraplex_server.api.job_record import JobRecord
from loraplex_server.logs import ACCESS_LOG

#: Where the exchange is in the ASGI scope.
EXCHANGE_KEY: Final = "loraplex.exchange"
NO_ROUTE: Final = "(none)"

access_log = logging.getLogger(ACCESS_LOG)


@dataclass
class Exchange:
    """One of them; used from the event loop.

    Attributes:
        request_id: as it comes back in `x-request-id`; known once the envelope has it.
        route: the template of its path, so that there are few.
        begun_ns: Unix time.
        started_s, ended_s: on the clock of the services, as the times in `jobs`.
        status: of the answer; 500 until there is one.
        jobs: what it had the engine do.
        extra_headers: makes headers for the answer when it begins.
    """

    method: str
    path: str
    headers: Headers
    started_s: float
    begun_ns: int = field(default_factory=time.time_ns)
    request_id: str = ""
    route: str = NO_ROUTE
    ended_s: float = 0.0
    status: int = 500
    is_stream: bool = False
    jobs: list[JobRecord] = field(default_factory=list)
    on_begin: Callable[[Exchange, Message], None] | None = None

    @classmethod
    def of(cls, scope: Scope) -> Exchange | None:
        """Return the exchange that a scope belongs to; None where nobody observes."""
        exchange = scope.get(EXCHANGE_KEY)
        return exchange if isinstance(exchange, cls) else None

    def begin_response(self, message: Message) -> None:
        """The answer's status and headers are about to be sent; headers may be added here."""
        self.status = message["status"]
        if self.on_begin is not None:
            self.on_begin(self, message)


class ExchangeSink(Protocol):
    """Takes exchanges that have ended."""

    def take(self, exchange: Exchange) -> None: ...


class Observer:
    """ASGI middleware.

    Args:
        load_headers: returns headers about the load for the answer to a request with these
            headers, if it asks for any.
        traces: where spans are made of exchanges; None for nowhere.
        logs_access: write one line for each.
        clock: of the services, in seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: HttpMetrics,
        load_headers: Callable[[Headers], list[tuple[bytes, bytes]]],
        traces: ExchangeSink | None,
        logs_access: bool,
        clock: Callable[[], float],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._load_headers = load_headers
        self._traces = traces
        self._logs_access = logs_access
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope[EXCHANGE_KEY] = Exchange(
            scope["method"],
            scope["path"],
            Headers(scope=scope),
            self._clock(),
            on_begin=self._begin_response,
        )
        self._metrics.num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._end(exchange, scope)

    def _begin_response(self, exchange: Exchange, message: Message) -> None:
        headers = message["headers"] = [*message.get("headers", ())]
        is_stream = any(n == b"content-type" and v.startswith(b"text/event-") for n, v in headers)
        exchange.is_stream = is_stream
        self._metrics.num_streams += is_stream
        headers += self._load_headers(exchange.headers)

    def _end(self, exchange: Exchange, scope: Scope) -> None:
        exchange.ended_s = self._clock()
        route = scope.get("route")
        exchange.route = getattr(route, "path", NO_ROUTE)
        self._metrics.num_open -= 1
        self._metrics.num_streams -= exchange.is_stream
        self._metrics.answered(exchange.method, exchange.route, exchange.status)
        if self._logs_access:
            _log_access(exchange)
        if self._traces is not None:
            self._traces.take(exchange)


def _log_access(exchange: Exchange) -> None:
    """Write the line: without the query and any header, which may hold secrets."""
    seconds = exchange.ended_s - exchange.started_s
    fields: dict[str, object] = {
        "request_id": exchange.request_id,
        "method": exchange.method,
        "path": exchange.path,
        "status": exchange.status,
        "seconds": round(seconds, 6),
    }
    if exchange.jobs:
        fields["model"] = ",".join(dict.fromkeys(job.model for job in exchange.jobs))
        fields["tenant"] = exchange.jobs[0].tenant
        fields["prompt_tokens"] = sum(job.num_prompt_tokens for job in exchange.jobs)
        fields["generated_tokens"] = sum(job.num_generated for job in exchange.jobs)
    access_log.info(
        "%s %r %d %.3f s",
        exchange.method,
        exchange.path,
        exchange.status,
        seconds,
        extra={"fields": fields},
    )
