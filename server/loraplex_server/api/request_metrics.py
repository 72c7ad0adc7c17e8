"""Counters and histograms of requests, filled in as their answers are written."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter

from loraplex_scheduler.plan import FinishReason
from loraplex_server.api.error_table import REJECTIONS, shape_of
from loraplex_server.api.errors import Overloaded
from loraplex_server.api.latency_histogram import LatencyHistogram

# Bucket borders in seconds, as vLLM has them, so that its dashboards fit.
_TTFT_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_S: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_E2E_S: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class RequestMetrics:
    """What the API process alone can measure; one per registry, used from the event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._finished = Counter(
            "loraplex_requests_finished",
            "Sequences that ended, by how they ended.",
            ["outcome"],
            registry=registry,
        )
        self._rejected = Counter(
            "loraplex_requests_rejected",
            "Requests that were told to come again later, by the code of the error.",
            ["reason"],
            registry=registry,
        )
        self._first_token_s = LatencyHistogram(
            "loraplex_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=_TTFT_S,
            registry=registry,
        )
        self._inter_token_s = LatencyHistogram(
            "loraplex_inter_token_latency_seconds",
            "Between two deliveries of tokens of one sequence.",
            buckets=_INTER_TOKEN_S,
            registry=registry,
        )
        self._e2e_s = LatencyHistogram(
            "loraplex_e2e_request_latency_seconds",
            "From the request's arrival to its end.",
            buckets=_E2E_S,
            registry=registry,
        )
        # So that every outcome and reason is on the page from the start.
        for outcome in FinishReason:
            self._finished.labels(outcome.value)
        for kind in REJECTIONS:
            self._rejected.labels(shape_of(kind).code)

    def reject(self, kind: type[Overloaded]) -> None:
        """A request was told to come again later; called once for each, whatever it held."""
        self._rejected.labels(shape_of(kind).code).inc()

    def first_token(self, since_arrival_s: float) -> None:
        """A sequence got its first token."""
        self._first_token_s.observe(since_arrival_s)

    def next_tokens(self, since_last_s: float) -> None:
        """A sequence got more tokens."""
        self._inter_token_s.observe(since_last_s)

    def finish(self, outcome: FinishReason, since_arrival_s: float) -> None:
        """A sequence ended; called exactly once for each that was accepted."""
        self._finished.labels(outcome.value).inc()
        self._e2e_s.observe(since_arrival_s)
