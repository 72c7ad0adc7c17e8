"""All that watches the service: its metrics, its traces, its access lines; built in one place."""

from __future__ import annotations

import asyncio
import contextlib

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, ProcessCollector

from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.engine_metrics import EngineCollector
from loraplex_server.api.exchange import Observer
from loraplex_server.api.http_metrics import HttpMetrics
from loraplex_server.api.load_report import LoadReport
from loraplex_server.api.registry_metrics import RegistryMetrics
from loraplex_server.api.request_metrics import RequestMetrics
from loraplex_server.api.services import Services
from loraplex_server.api.traces import Traces, open_traces


class Observation:
    """One per app; used from the event loop.

    Attributes:
        registry: what `/metrics` shows.
        requests: filled in by whoever runs requests.

    Raises:
        TracesUnavailable: traces are asked for and their library is not installed.
    """

    def __init__(self, services: Services, names: AdapterNames) -> None:
        config, base_name = services.config, services.base_names[0]
        self.registry = CollectorRegistry()
        self.requests = RequestMetrics(base_name, config.metrics_top_k, services.clock)
        self._http = HttpMetrics()
        self._services = services
        self._traces: Traces | None = None
        if config.otlp_endpoint is not None:
            self._traces = open_traces(config.otlp_endpoint)
        self._watch: asyncio.Task[None] | None = None
        is_shown = self.requests.adapters.is_shown
        self.registry.register(EngineCollector(services.engine, names, base_name, is_shown))
        self.registry.register(self.requests)
        self.registry.register(self._http)
        is_shared = config.registry_url is not None
        self.registry.register(RegistryMetrics(services.catalog.changes if is_shared else None))
        ProcessCollector(registry=self.registry)

    def install(self, app: FastAPI) -> None:
        """Stand around the application; to be called after all other middleware was added."""
        app.add_middleware(
            Observer,
            metrics=self._http,
            load_headers=LoadReport(self._services.engine).headers,
            traces=self._traces,
            logs_access=self._services.config.access_log,
            clock=self._services.clock,
        )

    def start(self) -> None:
        """Begin to measure the event loop that this is called in."""
        self._watch = asyncio.create_task(self._http.watch_loop())

    async def stop(self) -> None:
        """Stop measuring, and send the traces that have not been sent."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)
