from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.exposition import generate_latest

from loraplex import Client
from loraplex.prometheus_text import parse_families
from loraplex.types import Histogram, Metrics

ODD = 'a"b\\c\nd, e="f"} # g'


@pytest.fixture
def scrape() -> bytes:
    """What prometheus_client, the reference, writes."""
    registry = CollectorRegistry()
    Gauge("odd", "A help\nof \\ two lines", ["name"], registry=registry).labels(ODD).set(math.inf)
    counter = Counter("hits", "Hits.", ["use", "who"], registry=registry)
    counter.labels("a", "x").inc(2)
    counter.labels("b", "x").inc(3)
    histogram = PrometheusHistogram("size", "Sizes.", buckets=(1, 2, 4), registry=registry)
    for value in (0.5, 1.5, 1.5, 3.0, 9.0):
        histogram.observe(value)
    return generate_latest(registry)


def test_what_prometheus_writes_is_read(scrape):
    metrics = Metrics.from_body(scrape)
    [sample] = metrics.samples("odd")
    assert (sample.labels, sample.value) == ({"name": ODD}, math.inf)
    assert metrics.families["odd"].help == "A help\nof \\ two lines"
    assert metrics.value("hits_total") == 5
    assert metrics.value("hits_total", use="b") == 3
    assert metrics.value("hits_total", use="c") is None
    assert metrics.value("absent") is None
    assert metrics.families["size"].kind == "histogram"


def test_a_histogram_tells_quantiles_as_prometheus_would(scrape):
    histogram = Metrics.from_body(scrape).histogram("size")
    assert (histogram.count, histogram.total) == (5, 15.5)
    assert histogram.quantile(0.4) == 1.5  # the first half of two between 1 and 2
    assert histogram.quantile(0.99) == 4.0  # above the last bound: that bound
    assert Histogram().quantile(0.5) is None


def test_a_histogram_since_an_earlier_one_has_what_came_between(scrape):
    later = Metrics.from_body(scrape).histogram("size")
    earlier = Histogram(later.bounds, (1.0, 1.0, 1.0, 1.0), 0.5)
    assert later.since(earlier).counts == (0.0, 2.0, 3.0, 4.0)
    assert earlier.since(later) == earlier  # the server began again


@pytest.mark.parametrize("line", ["no sample at all", 'x{a="b" 1', "x{a=b} 1", "x one"])
def test_what_is_no_sample_is_refused(line):
    with pytest.raises(ValueError):
        parse_families(f"ok 1\n{line}\n")


def test_samples_without_a_declared_family_have_one_of_their_own():
    assert [family.name for family in parse_families("a_total 1\nb 2 1700000000\n")] == [
        "a_total",
        "b",
    ]


def test_a_real_servers_metrics_are_read_whole(tiny_server):
    with Client(base_url=tiny_server.base_url) as client:
        metrics = client.metrics()
        pages = client.pool().num_pages
    assert metrics.value("loraplex_pool_pages") == pages
    assert metrics.value("loraplex_engine_ready") == 1
    assert metrics.histogram("loraplex_time_to_first_token_seconds").bounds[-1] == math.inf
