"""Samples of declared series, as prometheus_client writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric

from loraplex_server.api.series import SERIES, Kind
from loraplex_server.engine.tally import TallyCounts

#: Values of the series' labels, in their order, and the value.
Sample = tuple[Sequence[str], float]

_NO_LABELS: Final[tuple[str, ...]] = ()


def family(name: str, samples: Iterable[Sample]) -> Metric:
    """Return a gauge or counter; raises KeyError for a series that is not declared."""
    series = SERIES[name]
    assert series.kind is not Kind.HISTOGRAM, f"{name} is a histogram"
    make = GaugeMetricFamily if series.kind is Kind.GAUGE else CounterMetricFamily
    metric = make(series.name, series.help, labels=series.labels)
    for labels, value in samples:
        assert len(labels) == len(series.labels), f"{name} has the labels {series.labels}"
        metric.add_metric(labels, value)
    return metric


def single(name: str, value: float) -> Metric:
    """Return a gauge or counter without labels."""
    return family(name, [(_NO_LABELS, value)])


def histogram(name: str, samples: Iterable[tuple[Sequence[str], TallyCounts]]) -> Metric:
    """Return a histogram; counts of nothing yet are zeros.

    Raises:
        KeyError: the series is not declared.
    """
    series = SERIES[name]
    borders = [*map(repr, series.borders), "+Inf"]
    metric = HistogramMetricFamily(series.name, series.help, labels=series.labels)
    for labels, tally in samples:
        counts = tally.counts or (0,) * len(borders)
        totals = map(float, accumulate(counts))
        metric.add_metric(labels, list(zip(borders, totals, strict=True)), tally.total)
    return metric
