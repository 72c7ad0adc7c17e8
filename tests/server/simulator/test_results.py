"""Metrics of runs small enough to work out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loraplex_server.simulator.results import Counters, Outcome
from loraplex_server.simulator.trace import Trace

NAN = float("nan")


def make_outcome(first_s, end_s):
    num = len(first_s)
    arrival_s = np.arange(num, dtype=float)
    trace = Trace(
        name="t",
        arrival_s=arrival_s,
        adapter=np.zeros(num, int),
        prompt_len=np.full(num, 10),
        output_len=np.full(num, 11),
        num_adapters=1,
        rate=1.0,
        duration_s=float(num),
    )
    return Outcome(
        trace=trace,
        arrival_s=arrival_s,
        first_s=np.array(first_s),
        end_s=np.array(end_s),
        num_cached=np.zeros(num),
        counters=Counters(num_loads=4, num_host_hits=1, prefix_queries=20, prefix_hits=5),
        num_rejected=1,
        wall_s=0.5,
    )


def test_requests_that_were_turned_away_count_against_attainment_only():
    summary = make_outcome([1.0, 8.0, NAN, 6.0], [3.0, 18.0, NAN, 40.0]).summary(slo_s=6.0)
    assert summary.num_completed == 3
    assert summary.duration_s == 40
    assert summary.throughput == pytest.approx(3 / 40)
    assert summary.tokens_per_s == pytest.approx(3 * 21 / 40)
    assert summary.attainment == pytest.approx(2 / 4)  # TTFT of 1, 7 and 3 seconds
    assert summary.goodput == pytest.approx(2 / 40)
    assert summary.satisfaction == pytest.approx(((1 - 1 / 36) + (1 - 9 / 36)) / 4)
    assert summary.ttft_p50 == pytest.approx(3)
    assert summary.ttft_mean == pytest.approx(11 / 3)
    assert summary.tpot_p50 == pytest.approx(1.0)
    assert summary.latency_mean == pytest.approx((3 + 17 + 37) / 3)


def test_strip_throughput_leaves_ten_seconds_off_each_end():
    summary = make_outcome([0.0] * 40, [40.0] * 40).summary()
    assert summary.strip_throughput == pytest.approx((40 - 20) / (40 - 20))


def test_steady_throughput_is_that_between_the_quartiles():
    filling, steady, draining = [10.0], [20.0, 22.0, 24.0, 26.0, 28.0, 30.0], [90.0]
    end_s = filling + steady + draining
    assert make_outcome([0.0] * 8, end_s).summary().steady_throughput == pytest.approx(0.5)
    assert math.isnan(make_outcome([0.0], [1.0]).summary().steady_throughput)


def test_rates_are_shares_of_what_was_asked_for():
    summary = make_outcome([1.0], [2.0]).summary()
    assert summary.host_hit_rate == 0.25
    assert summary.prefix_hit_rate == 0.25
    assert math.isnan(summary.adapter_hit_rate)


def test_counters_of_replicas_add_up():
    both = Counters(num_steps=2, busy_s=0.5) + Counters(num_steps=3, busy_s=0.25)
    assert both == Counters(num_steps=5, busy_s=0.75)
