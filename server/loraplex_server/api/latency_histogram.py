"""A histogram that is quick to fill: one observation is made for every token of every stream."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector


class LatencyHistogram(Collector):
    """Used from one thread but for `collect`, which any may call.

    prometheus_client's own takes locks and searches all buckets, ten times as long as this.
    """

    def __init__(
        self, name: str, help_text: str, *, buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        """Register it; `buckets` are upper borders in seconds, ascending, without infinity."""
        self._name = name
        self._help_text = help_text
        self._borders = [*buckets, float("inf")]
        self._counts = [0] * len(self._borders)
        self._sum = 0.0
        registry.register(self)

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._borders, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Return what was observed so far."""
        names = [*map(repr, self._borders[:-1]), "+Inf"]
        totals = map(float, accumulate(self._counts))
        buckets = list(zip(names, totals, strict=True))
        yield HistogramMetricFamily(
            self._name, self._help_text, buckets=buckets, sum_value=self._sum
        )
