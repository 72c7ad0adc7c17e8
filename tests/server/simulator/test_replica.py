"""Tiny simulations: nothing is lost, all depends on the trace alone, and accounts are sound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loraplex_scheduler.policies import PolicyChoice
from loraplex_server.simulator.fleet import Fleet
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import AdapterSet, Setting, llama
from loraplex_server.simulator.routing.names import make_router
from loraplex_server.simulator.setup import make_book, make_parts, ours, simulate, slora
from loraplex_server.simulator.trace import NOBODY, Trace
from loraplex_server.simulator.workloads import multi_turn_trace, slora_trace, zipf_trace

A100 = find_hardware("a100-80g")
SMALL = Setting("small", llama("small", 4, 1024, 8, 8, 2048), AdapterSet((8, 16, 32)))
SETUPS = {
    "ours": ours(SMALL, A100, pool_tokens=4096),
    "ours, cramped": ours(SMALL, A100, pool_tokens=1536, host_bytes=2e6),
    "greedy": ours(SMALL, A100, pool_tokens=1536, policy=PolicyChoice(admission="greedy")),
    "no prefix cache": ours(
        SMALL, A100, pool_tokens=4096, policy=PolicyChoice(has_prefix_cache=False)
    ),
    "slora": slora(SMALL, A100, pool_tokens=2048),
    "slora, cramped": slora(SMALL, A100, pool_tokens=1536, host_bytes=2e6),
}


def short_trace(num_adapters=30, rate=300.0, duration_s=0.3, seed=1):
    return slora_trace(
        num_adapters=num_adapters,
        rate=rate,
        duration_s=duration_s,
        input_range=(8, 150),
        output_range=(1, 40),
        seed=seed,
    )


def run_checked(setup, trace):
    """Run alone, with every account checked after every step."""
    fleet = Fleet(make_book(setup, trace), lambda: make_parts(setup))
    replica = fleet.replicas[0]
    replica.check = replica.parts.scheduler.check
    return fleet, fleet.run()


@pytest.mark.parametrize("name", SETUPS)
def test_every_request_ends_exactly_once_and_every_account_stays_sound(name):
    fleet, outcome = run_checked(SETUPS[name], short_trace())
    assert set(fleet.num_ends) == {1}
    assert not np.isnan(outcome.end_s).any()
    assert (outcome.first_s >= outcome.arrival_s).all()
    assert (outcome.end_s >= outcome.first_s).all()
    replica = fleet.replicas[0]
    assert replica.is_idle
    assert replica.parts.accounts.residency.num_pins() == 0


@pytest.mark.parametrize("name", SETUPS)
def test_the_same_seed_gives_the_same_run(name):
    first, second = (simulate(SETUPS[name], short_trace()) for _ in range(2))
    assert first.end_s.tolist() == second.end_s.tolist()
    assert first.counters == second.counters


def test_one_request_alone_takes_what_the_roofline_says():
    trace = Trace(
        name="one",
        arrival_s=np.array([0.5]),
        adapter=np.array([NOBODY]),
        prompt_len=np.array([100]),
        output_len=np.array([3]),
        num_adapters=0,
        rate=1.0,
        duration_s=1.0,
    )
    outcome = simulate(SETUPS["ours"], trace)
    roofline = make_parts(SETUPS["ours"]).roofline
    from loraplex_server.simulator.roofline import StepWork

    prefill_s = roofline.work_s(StepWork(100, 1, 100, 100 * 50.5, 0))
    decodes_s = sum(roofline.work_s(StepWork(1, 1, n, n, 0)) for n in (101, 102))
    assert outcome.first_s[0] - 0.5 == pytest.approx(prefill_s)
    assert outcome.end_s[0] - outcome.first_s[0] == pytest.approx(decodes_s)


def test_a_load_delays_its_request_by_the_bus_and_the_disk():
    trace = replace(short_trace(num_adapters=1, rate=2.0, duration_s=0.5), adapter=np.array([0]))
    with_adapter = simulate(SETUPS["ours"], trace)
    base = simulate(SETUPS["ours"], replace(trace, adapter=np.array([NOBODY])))
    num_bytes = 2 * 8 * 8 * 1024 * 4  # two bytes, rank, four inputs and four outputs, layers
    extra_s = with_adapter.ttft_s[0] - base.ttft_s[0]
    load_s = num_bytes / A100.host_link + num_bytes / A100.disk
    assert extra_s == pytest.approx(load_s, rel=0.1)


def test_a_blocking_engine_loads_again_what_it_dropped():
    outcome = simulate(SETUPS["slora"], short_trace(num_adapters=5))
    assert outcome.counters.num_loads > 5
    assert outcome.counters.num_adapter_evictions > 0
    assert simulate(SETUPS["ours"], short_trace(num_adapters=5)).counters.num_loads == 5


def test_later_turns_come_after_the_answer_and_find_its_prefix():
    trace = multi_turn_trace(rate=30, duration_s=2, num_adapters=3, think_s=0.1)
    outcome = simulate(SETUPS["ours"], trace)
    later = np.flatnonzero(trace.follows != NOBODY)
    gaps = outcome.arrival_s[later] - outcome.end_s[trace.follows[later]]
    assert gaps == pytest.approx(trace.arrival_s[later])
    # All whole pages of the turn before, but for the answer's last token, which has no KV.
    assert outcome.num_cached[later].min() > 0
    assert outcome.summary().prefix_hit_rate > 0.5


def test_without_a_prefix_cache_nothing_is_found():
    trace = multi_turn_trace(rate=30, duration_s=1, num_adapters=3, think_s=0.1)
    assert simulate(SETUPS["no prefix cache"], trace).num_cached.sum() == 0


@pytest.mark.parametrize("name", ["round-robin", "affine"])
@pytest.mark.parametrize("is_chat", [False, True])
def test_a_fleet_answers_everything_once(name, is_chat):
    trace = short_trace()
    if is_chat:
        trace = multi_turn_trace(rate=60, duration_s=1, num_adapters=9, think_s=0.2)
    outcome = simulate(SETUPS["ours"], trace, num_replicas=3, router=make_router(name, 3, 1))
    assert not np.isnan(outcome.end_s).any()
    again = simulate(SETUPS["ours"], trace, num_replicas=3, router=make_router(name, 3, 1))
    assert outcome.end_s.tolist() == again.end_s.tolist()


def test_a_fleet_of_one_behaves_like_a_replica_behind_any_router():
    alone = simulate(SETUPS["ours"], short_trace())
    routed = simulate(SETUPS["ours"], short_trace(), router=make_router("affine", 1, 1))
    assert alone.end_s.tolist() == routed.end_s.tolist()


def test_affine_routing_loads_each_adapter_on_fewer_replicas():
    trace = zipf_trace(
        num_adapters=60, rate=400, duration_s=0.5, input_range=(8, 64), output_range=(1, 16)
    )
    setup = ours(SMALL, A100, pool_tokens=8192)
    spread = simulate(setup, trace, num_replicas=4)
    affine = simulate(setup, trace, num_replicas=4, router=make_router("affine", 4, 1))
    assert affine.counters.num_loads < 0.7 * spread.counters.num_loads


def test_promises_are_kept_or_refused():
    setup = ours(SMALL, A100, pool_tokens=1536, promise_s=0.05)
    trace = short_trace(rate=20_000, duration_s=0.02)
    fleet, outcome = run_checked(setup, trace)
    assert set(fleet.num_ends) == {1}
    assert 0 < outcome.num_rejected < len(trace)
    assert np.isnan(outcome.end_s).sum() == outcome.num_rejected


def test_early_abort_drops_those_who_wait_too_long():
    setup = slora(SMALL, A100, pool_tokens=1536, aborts_early=0.53)
    trace = short_trace(rate=3000, duration_s=0.15)
    fleet, outcome = run_checked(setup, trace)
    assert set(fleet.num_ends) == {1}
    assert 0 < outcome.num_rejected < len(trace)
    assert np.nanmax(outcome.ttft_s) < 0.53
