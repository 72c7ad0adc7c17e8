"""The oracle of an engine: nothing that the engine does may surpass it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loraplex_scheduler.policies import PolicyChoice
from loraplex_server.simulator.experiments.overload import engine_server
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import find_setting
from loraplex_server.simulator.oracle import upper_bound
from loraplex_server.simulator.results import steady_throughput
from loraplex_server.simulator.setup import ours, simulate
from loraplex_server.simulator.workloads import slora_trace

SLO_S = 0.2
BASE = ours(
    find_setting("S1"),
    find_hardware("a10g"),
    pool_tokens=6000,
    policy=PolicyChoice(order="fcfs", overload="none"),
)


def make_trace(rate, cv=1.0):
    return slora_trace(
        num_adapters=20,
        rate=rate,
        duration_s=150 / rate,
        input_range=(8, 64),
        output_range=(8, 64),
        cv=cv,
    )


@pytest.mark.parametrize("cv", [1.0, 6.0])
def test_no_policy_has_more_first_tokens_in_time_than_the_oracle(cv):
    flooded = simulate(BASE, make_trace(1000))
    trace = make_trace(1.5 * steady_throughput(flooded), cv)
    server = engine_server(BASE, flooded, trace)
    best = upper_bound(trace.arrival_s, SLO_S, [server])
    for order in ("fcfs", "lcfs"):
        policy = PolicyChoice(order=order, overload="none")
        outcome = simulate(replace(BASE, policy=policy), trace)
        assert (outcome.ttft_s <= SLO_S).sum() <= best
    promised = simulate(replace(BASE, policy=PolicyChoice(), promise_s=SLO_S), trace)
    assert 0 < (promised.ttft_s <= SLO_S).sum() <= best


def test_the_oracles_server_works_at_the_rate_of_the_flooded_engine():
    trace = make_trace(1000)
    flooded = simulate(BASE, trace)
    server = engine_server(BASE, flooded, trace)
    first, last = np.quantile(flooded.end_s, [0.25, 0.75])
    ended = (flooded.end_s > first) & (flooded.end_s <= last)
    assert server.work_s[ended].sum() == pytest.approx(last - first)
