"""OpenTelemetry traces of requests, made when they have ended, of times that were recorded anyway.

    POST /v1/completions            (server; parent: the caller's span, by `traceparent`)
      generate                      one for each sequence
        queue | load_adapter | prefill | decode

The server works without the library; `open_traces` is the only thing that imports it. Sampling,
headers and time-outs of the exporter are set by OpenTelemetry's own variables (`OTEL_...`).
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from loraplex_scheduler.plan import FinishReason
from loraplex_server.api.exchange import Exchange
from loraplex_server.api.job_record import ERRORS, JobRecord, SequenceRecord

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_NS: Final = 1_000_000_000
_TRACES_PATH: Final = "/v1/traces"


class TracesUnavailable(Exception):
    """Traces were asked for and the library is not installed; the message says what to do."""


class Traces:
    """Makes spans in the event loop; a thread of the library sends them in batches.

    Args:
        provider: of tracers; closed with this.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("loraplex", version("loraplex"))
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def take(self, exchange: Exchange) -> None:
        """Make the spans of a request that had the engine do something, or tried to."""
        if exchange.method != "POST":
            return
        # Recorded times are of a clock that starts anywhere; the request's begin is on both.
        offset_ns = exchange.begun_ns - int(exchange.started_s * _NS)
        parent = self._propagator.extract(dict(exchange.headers))
        span = self._tracer.start_span(
            f"{exchange.method} {exchange.route}",
            context=parent,
            kind=self._trace.SpanKind.SERVER,
            start_time=exchange.begun_ns,
            attributes=_exchange_attributes(exchange),
        )
        if span.is_recording():
            within = self._trace.set_span_in_context(span)
            for job in exchange.jobs:
                for index in range(len(job.sequences)):
                    self._sequence(job, index, within, offset_ns)
        if exchange.status >= 500:
            self._fail(span, f"status {exchange.status}")
        span.end(offset_ns + int(exchange.ended_s * _NS))

    def close(self) -> None:
        """Send what has not been sent; may take seconds, so call it from a thread."""
        self._provider.shutdown()

    def _sequence(self, job: JobRecord, index: int, within: Context, offset_ns: int) -> None:
        sequence = job.sequences[index]
        span = self._tracer.start_span(
            "generate",
            context=within,
            start_time=offset_ns + int(job.arrival_s * _NS),
            attributes=_sequence_attributes(job, index),
        )
        inside = self._trace.set_span_in_context(span)
        for name, start_s, end_s in _phases(job, sequence):
            phase = self._tracer.start_span(
                name, context=inside, start_time=offset_ns + int(start_s * _NS)
            )
            phase.end(offset_ns + int(end_s * _NS))
        if sequence.outcome in ERRORS:
            self._fail(span, str(sequence.outcome))
        span.end(offset_ns + int(sequence.end_s * _NS))

    def _fail(self, span: Span, why: str) -> None:
        span.set_status(self._trace.StatusCode.ERROR, why)


def open_traces(endpoint: str) -> Traces:
    """Return what sends traces to an OTLP collector over HTTP.

    Args:
        endpoint: its URL; where it has no path, `/v1/traces` is added.

    Raises:
        TracesUnavailable: the extra `trace` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracesUnavailable(
            "otlp_endpoint needs OpenTelemetry: pip install 'loraplex[trace]'"
        ) from error
    url = endpoint.rstrip("/")
    if not urlsplit(url).path:
        url += _TRACES_PATH
    # OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME go before these.
    defaults = Resource({SERVICE_NAME: "loraplex", SERVICE_VERSION: version("loraplex")})
    provider = TracerProvider(resource=defaults.merge(_resource_from_env()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url)))
    return Traces(provider)


def _resource_from_env() -> Any:
    from opentelemetry.sdk.resources import OTELResourceDetector

    return OTELResourceDetector().detect()


def _exchange_attributes(exchange: Exchange) -> dict[str, str | int]:
    """Return what the request's span says: no query, no header but the id, no text of users."""
    return {
        "http.request.method": exchange.method,
        "http.route": exchange.route,
        "http.response.status_code": exchange.status,
        "loraplex.request_id": exchange.request_id,
    }


def _sequence_attributes(job: JobRecord, index: int) -> dict[str, Any]:
    sequence = job.sequences[index]
    return {
        "gen_ai.request.model": job.model,
        "gen_ai.usage.input_tokens": sequence.num_prompt,
        "gen_ai.usage.output_tokens": sequence.num_generated,
        "gen_ai.response.finish_reasons": [str(sequence.outcome or FinishReason.CANCELLED)],
        "loraplex.adapter_ids": list(job.adapter_ids),
        "loraplex.tenant": job.tenant,
        "loraplex.sequence": index,
    }


def _phases(job: JobRecord, sequence: SequenceRecord) -> list[tuple[str, float, float]]:
    """Return each phase with its start and end, one after the other from arrival on."""
    times, begun_s = sequence.times, job.arrival_s
    phases = []
    if times is not None:
        for name, took_s in (
            ("queue", times.queue_s),
            ("load_adapter", times.load_s),
            ("prefill", times.prefill_s),
        ):
            if name != "load_adapter" or job.adapter_ids:
                phases.append((name, begun_s, begun_s + took_s))
            begun_s += took_s
    if sequence.first_token_s is not None:
        phases.append(("decode", sequence.first_token_s, sequence.end_s))
    return phases
