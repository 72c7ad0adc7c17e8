"""Small fleets: who serves what, what is loaded, what a death does, and closed formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loraplex_scheduler.policies import PolicyChoice
from loraplex_server.simulator.experiments.fleet_case import Case, run_case
from loraplex_server.simulator.experiments.fleet_death import moved_shares
from loraplex_server.simulator.fleet import Death, Fleet
from loraplex_server.simulator.fleet_figures import Objective, fleet_figures
from loraplex_server.simulator.hardware import find_hardware
from loraplex_server.simulator.models import AdapterSet, Setting, llama
from loraplex_server.simulator.object_store import StoreSpeed
from loraplex_server.simulator.results import Found
from loraplex_server.simulator.routing.names import ROUTERS, make_router
from loraplex_server.simulator.setup import make_book, make_parts, ours
from loraplex_server.simulator.warmth import WARM_S, warm_up
from loraplex_server.simulator.workloads import zipf_shares, zipf_trace

A100 = find_hardware("a100-80g")
SMALL = Setting("small", llama("small", 4, 1024, 8, 8, 2048), AdapterSet((8,)))
NO_CACHE = PolicyChoice(order="fcfs", overload="none", has_prefix_cache=False)
SETUP = ours(SMALL, A100, pool_tokens=2048, host_bytes=8e6, policy=NO_CACHE)
STORE = StoreSpeed(first_byte_s=0.05, stream_bytes_per_s=50e6, network_bytes_per_s=1e9)


def make_trace(num_adapters=300, rate=600.0, duration_s=0.5, zipf_s=1.0, seed=1):
    return zipf_trace(
        num_adapters=num_adapters,
        rate=rate,
        duration_s=duration_s,
        zipf_s=zipf_s,
        input_range=(8, 64),
        output_range=(1, 16),
        seed=seed,
    )


def run_fleet(name, num_replicas=4, setup=SETUP, trace=None, deaths=()):
    trace = trace or make_trace()
    router = make_router(name, num_replicas, 1)
    book = make_book(setup, trace)
    fleet = Fleet(book, lambda: make_parts(setup), num_replicas, router, deaths)
    return fleet, fleet.run()


@pytest.mark.parametrize("name", ROUTERS)
def test_every_policy_answers_everything_once_from_an_object_store(name):
    fleet, outcome = run_fleet(name, setup=replace(SETUP, store=STORE))
    assert set(fleet.num_ends) == {1}
    assert (outcome.first_s >= outcome.arrival_s).all()
    assert set(outcome.replica.tolist()) == {0, 1, 2, 3}
    assert all(replica.is_idle for replica in fleet.replicas)


@pytest.mark.parametrize("name", ["consistent", "two-choices", "popularity"])
def test_affine_policies_need_fewer_loads_and_fetches_than_random(name):
    setup, trace = replace(SETUP, store=STORE), make_trace(num_adapters=80, rate=800)
    spread, affine = (run_fleet(n, 4, setup, trace)[1].counters for n in ("random", name))
    assert affine.num_loads < 0.8 * spread.num_loads
    assert affine.fetched_bytes < 0.8 * spread.fetched_bytes


def test_a_cold_adapter_waits_for_its_file_and_a_warm_one_does_not():
    _, outcome = run_fleet("consistent", setup=replace(SETUP, store=STORE))
    cold = outcome.found == Found.COLD
    _, first_asked = np.unique(outcome.trace.adapter, return_index=True)
    assert cold[first_asked].all()
    assert outcome.ttft_s[first_asked].min() > STORE.first_byte_s
    assert outcome.ttft_s[~cold].max() < STORE.first_byte_s


def test_a_death_loses_no_request_and_those_it_hit_waited_since_they_came():
    trace = make_trace()
    _, calm = run_fleet("popularity", trace=trace)
    hit = int(np.flatnonzero((calm.replica == 2) & (trace.output_len > 4))[20])
    death_s = float(calm.first_s[hit] + calm.end_s[hit]) / 2
    death = Death(death_s, replica=2, retry_s=0.25)
    fleet, outcome = run_fleet("popularity", trace=trace, deaths=(death,))
    assert set(fleet.num_ends) == {1}
    assert not np.isnan(outcome.end_s).any()
    assert (outcome.arrival_s == trace.arrival_s).all()
    assert outcome.replica[hit] != 2
    assert outcome.first_s[hit] > death_s + 0.25
    assert (outcome.replica[trace.arrival_s >= death_s] != 2).all()


def test_nobody_is_left_to_die_last():
    with pytest.raises(ValueError, match="survivor"):
        run_fleet("random", num_replicas=1, deaths=(Death(0.1, 0),))


def test_a_death_moves_the_share_that_closed_forms_say():
    case = Case(num_adapters=5000)
    assert moved_shares(case, "modulo", 20)[0] == pytest.approx(1 - 1 / 20, abs=0.02)
    assert moved_shares(case, "consistent", 20)[0] == pytest.approx(1 / 20, abs=0.02)
    assert moved_shares(case, "random", 20) == (0.0, 0.0)


def che_hit_rate(shares, num_cached):
    """Return an LRU cache's hit rate under independent requests (Che, Tung and Wang, 2002).

    T solves sum(1 - exp(-p T)) = C, and the rate is sum(p (1 - exp(-p T))).
    """
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        is_more = (1 - np.exp(-shares * middle)).sum() > num_cached
        low, high = (low, middle) if is_more else (middle, high)
    return float((shares * (1 - np.exp(-shares * low))).sum())


@pytest.mark.parametrize("zipf_s", [0.6, 1.0])
def test_an_lru_pools_hits_are_those_of_ches_approximation(zipf_s):
    setup = replace(SETUP, policy=replace(NO_CACHE, eviction="lru"), pool_tokens=4096)
    trace = make_trace(num_adapters=400, rate=200, duration_s=20, zipf_s=zipf_s)
    trace = replace(trace, prompt_len=np.full_like(trace.prompt_len, 8))
    trace = replace(trace, output_len=np.ones_like(trace.output_len))
    fleet, outcome = run_fleet("random", num_replicas=1, setup=setup, trace=trace)
    num_cached = len(fleet.replicas[0].parts.accounts.residency)
    hits = (outcome.found[len(trace) // 4 :] == Found.POOL).mean()
    assert 20 < num_cached < 200
    assert hits == pytest.approx(che_hit_rate(zipf_shares(400, zipf_s), num_cached), abs=0.03)


def warm_figures(name, num_replicas=3, host_gib=4.0, num_adapters=6000):
    case = Case(num_adapters=num_adapters, rate=150.0, host_gib=host_gib, measured_s=2.0)
    return run_case(replace(case, settle_s=0.2), name, num_replicas)[1]


def test_a_warm_replica_finds_in_its_pool_what_is_asked_for_most():
    case = Case(num_adapters=6000, rate=150.0, host_gib=1.0, settle_s=0.2, measured_s=2.0)
    parts = make_parts(case.setup)
    mean_pages = np.mean([7, 13, 26, 52])  # ranks 8, 16, 32, 64
    num_fitting = int(0.95 * parts.accounts.num_free / mean_pages)
    expected = zipf_shares(6000, 1.0)[:num_fitting].sum()
    assert warm_figures("random", host_gib=1.0).in_pool == pytest.approx(expected, abs=0.06)


def test_a_warm_affine_fleet_finds_nearly_all_and_a_random_one_does_not():
    affine, spread = warm_figures("popularity"), warm_figures("random")
    assert affine.cold < 0.03 < 0.06 < spread.cold
    assert affine.fetched_bytes_per_s < 0.5 * spread.fetched_bytes_per_s


def test_warming_keeps_every_account_sound():
    case = Case(num_adapters=6000, rate=150.0, host_gib=4.0, settle_s=0.1, measured_s=0.2)
    setup, router = case.setup, make_router("bounded", 2, 1)
    fleet = Fleet(make_book(setup, case.trace), lambda: make_parts(setup), 2, router)
    warm_up(fleet, router, zipf_shares(6000, 1.0), 150.0)
    for replica in fleet.replicas:
        replica.parts.accounts.allocator.check()
        replica.parts.link.host.check()
        assert replica.parts.accounts.clock.now_s <= WARM_S
        assert len(replica.parts.link.host) > 50
    assert not np.isnan(fleet.run().end_s).any()


def test_random_routing_does_not_follow_the_adapters_that_a_trace_of_its_seed_draws():
    trace = make_trace(num_adapters=80, rate=4000, seed=1)
    _, outcome = run_fleet("random", trace=trace)
    pairs = set(zip(outcome.replica.tolist(), trace.adapter.tolist(), strict=True))
    assert len(pairs) > 3 * len(set(trace.adapter.tolist()))


def test_figures_of_a_fleet_are_over_the_span_asked_for():
    fleet, outcome = run_fleet("random", setup=replace(SETUP, store=STORE))
    page_bytes = fleet.replicas[0].parts.page_bytes
    strict = Objective(ttft_s=0.04, inter_token_s=1.0)
    figures = fleet_figures(outcome, 4, strict, page_bytes=page_bytes, since_s=0.2, until_s=0.4)
    is_asked = (outcome.arrival_s >= 0.2) & (outcome.arrival_s < 0.4)
    assert figures.attainment == pytest.approx((outcome.ttft_s[is_asked] <= 0.04).mean())
    assert figures.in_pool + figures.in_host + figures.cold == pytest.approx(1.0)
    assert figures.imbalance >= 1.0
    assert 0 < figures.utilization < 1
    assert not figures.meets(strict)
