"""What the server says of itself at one time, and what happened between two times. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from loraplex.types import Histogram, Metrics, Pool

TTFT = "loraplex_time_to_first_token_seconds"
BETWEEN_TOKENS = "loraplex_inter_token_latency_seconds"


@dataclass(frozen=True)
class Reading:
    """One answer of /metrics and of /v1/pool, and when they came, in seconds of any clock."""

    at_s: float
    metrics: Metrics
    pool: Pool

    def gauge(self, name: str) -> float:
        """Return a gauge, 0 where the server has no such metric."""
        return self.metrics.value(name) or 0.0


@dataclass(frozen=True)
class Window:
    """What happened from one reading to a later one; to the same one, nothing did."""

    start: Reading
    end: Reading

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end.at_s - self.start.at_s

    def growth(self, counter: str, **labels: str) -> float:
        """Return by how much a counter grew; all of it where the server began again."""
        after = self.end.metrics.value(counter, **labels) or 0.0
        before = self.start.metrics.value(counter, **labels) or 0.0
        return after - before if after >= before else after

    def rate(self, counter: str, **labels: str) -> float | None:
        """Return the growth per second, None without any time between the readings."""
        return self.growth(counter, **labels) / self.seconds if self.seconds > 0 else None

    def histogram(self, name: str) -> Histogram:
        """Return what was observed meanwhile."""
        return self.end.metrics.histogram(name).since(self.start.metrics.histogram(name))

    def share(self, part: str, whole: str) -> float | None:
        """Return the quotient of two counters' growths, None where the whole did not grow."""
        total = self.growth(whole)
        return self.growth(part) / total if total else None


@dataclass
class History:
    """The readings of the last `span_s` seconds, and at least the last two. Owned by one view."""

    span_s: float
    readings: deque[Reading] = field(default_factory=deque)

    def add(self, reading: Reading) -> Window:
        """Take a reading; return the window up to it."""
        self.readings.append(reading)
        while len(self.readings) > 2 and self.readings[1].at_s <= reading.at_s - self.span_s:
            self.readings.popleft()
        return Window(self.readings[0], reading)


def summary(window: Window) -> dict[str, object]:
    """Return what `top` shows, for programs: rates per second, times in seconds."""
    end = window.end
    return {
        "window_s": round(window.seconds, 3),
        "pool": end.pool.model_dump(
            include={"num_pages", "page_bytes", *(u for u, _ in uses(end))}
        ),
        "adapters": adapters_by_tier(end.pool),
        "requests_running": end.gauge("loraplex_requests_running"),
        "requests_waiting": end.gauge("loraplex_requests_waiting"),
        "requests_per_s": window.rate("loraplex_requests_finished_total"),
        "rejections_per_s": window.rate("loraplex_requests_rejected_total"),
        "preemptions_per_s": window.rate("loraplex_preemptions_total"),
        "generated_tokens_per_s": window.rate("loraplex_generated_tokens_total"),
        "prompt_tokens_per_s": window.rate("loraplex_prompt_tokens_total"),
        "prefix_hit_share": window.share(
            "loraplex_prefix_hit_tokens_total", "loraplex_prefix_query_tokens_total"
        ),
        "ttft_s": quantiles(window.histogram(TTFT)),
        "between_tokens_s": quantiles(window.histogram(BETWEEN_TOKENS)),
    }


def quantiles(
    histogram: Histogram, wanted: Iterable[float] = (0.5, 0.9, 0.99)
) -> dict[str, object]:
    """Return quantiles by their names ("p50"), and how many observations they are of."""
    found = {f"p{q * 100:g}": histogram.quantile(q) for q in wanted}
    return {**found, "count": histogram.count}


def uses(reading: Reading) -> list[tuple[str, int]]:
    """Return the pages of the pool by use, in the order of the map."""
    pool = reading.pool
    return [
        ("kv", pool.kv),
        ("prefix_used", pool.prefix_used),
        ("prefix_idle", pool.prefix_idle),
        ("adapters", pool.adapters),
        ("free", pool.free),
    ]


def adapters_by_tier(pool: Pool) -> dict[str, int]:
    """Count the adapters in the pool, on their way there, and in host memory alone."""
    states = {h.id: h.state for h in pool.by_adapter if h.id is not None}
    resident = sum(state == "resident" for state in states.values())
    loading = sum(state == "loading" for state in states.values())
    near = {"resident", "loading"}
    host = sum(states.get(adapter.id) not in near for adapter in pool.host.adapters)
    return {"pool": resident, "loading": loading, "host_only": host}
