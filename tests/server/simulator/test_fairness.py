"""The service gap, on runs whose gap is plain."""

from __future__ import annotations

import numpy as np
import pytest

from loraplex_server.simulator.fairness import service_gap
from loraplex_server.simulator.results import Counters, Outcome
from loraplex_server.simulator.workloads import vtc_trace


def serve(trace, took_s, wait_s):
    """Return an outcome in which tenant i waits `wait_s[i]` and then takes `took_s`."""
    first = trace.arrival_s + np.array(wait_s)[trace.tenant]
    return Outcome(
        trace=trace,
        arrival_s=trace.arrival_s,
        first_s=first,
        end_s=first + took_s,
        num_cached=np.zeros(len(trace)),
        counters=Counters(),
        num_rejected=0,
        wall_s=0.0,
    )


def test_two_tenants_served_alike_have_no_gap():
    gap = service_gap(serve(vtc_trace(rates=(2, 2), duration_s=300), 1.0, (0.5, 0.5)))
    assert gap.most == pytest.approx(0, abs=1e-6)
    assert gap.most_accumulated == pytest.approx(0, abs=1e-6)


def test_service_is_prompt_plus_twice_the_output_per_second():
    gap = service_gap(serve(vtc_trace(rates=(2, 2), duration_s=300), 1.0, (0.5, 0.5)))
    assert gap.service[:, 50].tolist() == pytest.approx([2 * 768] * 2, rel=0.02)


def test_who_gets_all_it_asked_for_is_not_behind():
    gap = service_gap(serve(vtc_trace(rates=(1, 2), duration_s=300), 0.5, (0.1, 0.1)))
    assert gap.gap[20:80].max() < 0.05 * 2 * 768
    assert gap.most_accumulated == pytest.approx(300 * 768, rel=0.02)


def test_who_waits_for_good_is_behind_by_what_it_asked_for():
    gap = service_gap(serve(vtc_trace(rates=(2, 2), duration_s=300), 1.0, (0.5, 1000.0)))
    assert gap.gap[50] == pytest.approx(2 * 768, rel=0.02)


def test_requests_that_were_turned_away_are_no_service():
    outcome = serve(vtc_trace(rates=(2, 2), duration_s=300), 1.0, (0.5, 0.5))
    outcome.first_s[outcome.trace.tenant == 1] = np.nan
    outcome.end_s[outcome.trace.tenant == 1] = np.nan
    assert service_gap(outcome).gap[50] == pytest.approx(2 * 768, rel=0.02)
