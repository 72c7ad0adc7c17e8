from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from loraplex_server.api.latency_histogram import LatencyHistogram

BORDERS = (0.001, 0.25, 1.0, 2560.0)


@given(st.lists(st.sampled_from(BORDERS) | st.floats(0, 1e4, allow_nan=False)))
def test_it_shows_what_prometheus_own_histogram_shows(values):
    pages = []
    for kind in (LatencyHistogram, Histogram):
        registry = CollectorRegistry()
        histogram = kind("some_seconds", "Some time.", buckets=BORDERS, registry=registry)
        for value in values:
            histogram.observe(value)
        lines = generate_latest(registry).decode().splitlines()
        pages.append([line for line in lines if "_created" not in line])
    assert pages[0] == pages[1]
