"""What the API process does as a web server: requests, streams, and how late its event loop is."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Final

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_server.api.families import family, histogram, single
from loraplex_server.api.series import LAG_S
from loraplex_server.engine.tally import Tally

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_TICK_S: Final = 0.1


class HttpMetrics(Collector):
    """Used from the event loop.

    Attributes:
        num_open: requests being answered.
        num_streams: those of them that are streams of events.
    """

    def __init__(self) -> None:
        self.num_open = 0
        self.num_streams = 0
        self._answered: Counter[tuple[str, str, str]] = Counter()
        self._lag = Tally(LAG_S)

    def answered(self, method: str, route: str, status: int) -> None:
        """Count an answer; `route` is a template of paths, or there would be any number of them."""
        known = method if method in _METHODS else "other"
        self._answered[known, route, str(status)] += 1

    async def watch_loop(self) -> None:
        """Measure the event loop's lag until cancelled: how much later than wished it wakes up."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self._lag.observe(max(0.0, loop.time() - due_s))

    def collect(self) -> Iterator[Metric]:
        """Yield everything so far."""
        yield family("loraplex_http_requests", self._answered.items())
        yield single("loraplex_http_requests_open", self.num_open)
        yield single("loraplex_sse_streams_open", self.num_streams)
        yield histogram("loraplex_event_loop_lag_seconds", [((), self._lag.counts())])
