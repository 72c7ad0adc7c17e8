from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.registry import Collector

from loraplex_server.api.families import family, histogram
from loraplex_server.api.series import SERIES
from loraplex_server.engine.tally import NO_COUNTS, Tally

NAME = "loraplex_time_to_first_token_seconds"
BORDERS = SERIES[NAME].borders


class Shown(Collector):
    def __init__(self, *metrics):
        self._metrics = metrics

    def collect(self):
        return self._metrics


def page(*collectors) -> list[str]:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return generate_latest(registry).decode().splitlines()


@given(st.lists(st.sampled_from(BORDERS) | st.floats(0, 1e4, allow_nan=False)))
def test_a_histogram_shows_what_prometheus_own_shows(values):
    tally = Tally(BORDERS)
    theirs = Histogram(NAME, SERIES[NAME].help, buckets=BORDERS, registry=None)
    for value in values:
        tally.observe(value)
        theirs.observe(value)
    expected = [line for line in page(theirs) if "_created" not in line]
    assert page(Shown(histogram(NAME, [((), tally.counts())]))) == expected


def test_a_histogram_of_nothing_is_zeros():
    lines = page(Shown(histogram(NAME, [((), NO_COUNTS)])))
    assert f'{NAME}_bucket{{le="+Inf"}} 0.0' in lines
    assert f"{NAME}_count 0.0" in lines


def test_only_declared_series_with_their_labels_can_be_shown():
    with pytest.raises(KeyError):
        family("loraplex_surprise", [((), 1)])
    with pytest.raises(AssertionError):
        family("loraplex_pool_pages", [((), 1)])
