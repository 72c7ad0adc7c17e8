"""Routing policies by themselves: what they promise of placement, balance and moves."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from math import ceil

import numpy as np
import pytest

from loraplex_server.simulator.requests import adapter_id
from loraplex_server.simulator.routing.affine import BoundedLoad, ConsistentHash, TwoChoices
from loraplex_server.simulator.routing.gateway import GatewayPicker, lora_score
from loraplex_server.simulator.routing.names import ROUTERS, make_router
from loraplex_server.simulator.routing.popularity import PopularityPlacement
from loraplex_server.simulator.routing.preferences import HashRing, Rendezvous
from loraplex_server.simulator.routing.router import FleetView, ReplicaReport
from loraplex_server.simulator.workloads import zipf_trace
from tests.support.proxies import HAPROXY_CONFIG

EMPTY = ReplicaReport(num_waiting=0, ready=(), waited_for=(), max_adapters=10)


def make_view(num_replicas, in_flight=None, dead=()):
    alive = [i for i in range(num_replicas) if i not in dead]
    return FleetView(in_flight or [0] * num_replicas, alive, [EMPTY] * num_replicas)


def owners(router, view, num_adapters=4000):
    return np.array([router.choose(adapter, view) for adapter in range(num_adapters)])


@pytest.mark.parametrize(("points", "least", "most"), [(16, 0.15, 0.40), (1024, 0.02, 0.06)])
def test_shares_of_a_ring_differ_by_one_over_the_root_of_its_points(points, least, most):
    router = ConsistentHash(HashRing(30, points=points))
    shares = np.bincount(owners(router, make_view(30), 60_000), minlength=30) / 2000
    assert least < shares.std() < most  # 0.25 and 0.03; 0.02 of it is the draw of the adapters


def test_rendezvous_shares_differ_by_no_more_than_a_draw_does():
    shares = np.bincount(owners(ConsistentHash(Rendezvous(10)), make_view(10), 10_000)) / 1000
    assert shares.std() < 2 / np.sqrt(1000)


@pytest.mark.parametrize("preferences", [HashRing, Rendezvous])
def test_a_death_moves_only_the_adapters_of_the_dead(preferences):
    router = ConsistentHash(preferences(10))
    before, after = (owners(router, make_view(10, dead=dead)) for dead in ((), (3,)))
    assert ((before != after) == (before == 3)).all()
    assert 3 not in after
    assert 0.05 < (before != after).mean() < 0.15


def test_a_death_moves_nearly_every_adapter_of_a_modulo_hash():
    router = make_router("modulo", 10, 1)
    before, after = (owners(router, make_view(10, dead=dead)) for dead in ((), (3,)))
    assert (before != after).mean() > 0.8


@pytest.mark.parametrize("preferences", [HashRing, Rendezvous])
@pytest.mark.parametrize("bound", [1.25, 2.0])
def test_bounded_load_keeps_every_replica_under_its_factor(preferences, bound):
    router, view = BoundedLoad(preferences(8), bound=bound), make_view(8)
    trace = zipf_trace(num_adapters=500, rate=100, duration_s=20, zipf_s=1.2)
    for num, adapter in enumerate(trace.adapter.tolist(), start=1):
        chosen = router.choose(adapter, view)
        view.in_flight[chosen] += 1
        assert view.in_flight[chosen] <= ceil(bound * num / 8)
    unbounded = np.bincount(owners(ConsistentHash(preferences(8)), make_view(8))[trace.adapter])
    assert unbounded.max() > bound * len(trace) / 8  # so the bound was needed


def test_bounded_load_leaves_an_adapter_at_home_while_there_is_room():
    ring = HashRing(8)
    bounded, plain = BoundedLoad(ring), ConsistentHash(ring)
    view = make_view(8, in_flight=[5] * 8)
    assert (owners(bounded, view) == owners(plain, view)).all()


def test_the_bound_of_the_shipped_proxies_is_simulated():
    """Of 4 requests on 2 replicas, this one included, 1.25 lets one have 2, and 1.5 three."""
    home = make_router("consistent", 2, 1).choose(0, make_view(2))
    view = make_view(2, in_flight=[2 if replica == home else 1 for replica in range(2)])
    chosen = [make_router(name, 2, 1).choose(0, view) for name in ("bounded", "bounded-150")]
    assert chosen == [1 - home, home]
    assert "hash-balance-factor 150\n" in HAPROXY_CONFIG.read_text()


def test_of_two_choices_the_less_loaded_is_taken():
    ring = HashRing(8)
    first, second = islice(ring.order(7), 2)
    in_flight = [0] * 8
    in_flight[first] = 3
    assert TwoChoices(ring).choose(7, make_view(8, in_flight)) == second
    in_flight[second] = 4
    assert TwoChoices(ring).choose(7, make_view(8, in_flight)) == first


def test_popularity_gives_hot_adapters_more_homes_and_cold_ones_one():
    router = PopularityPlacement(HashRing(20))
    view = make_view(20)
    assert [len(router.homes(1, share, view.alive)) for share in (0, 0.002, 0.01, 0.1)] == [
        1,
        1,
        4,
        20,
    ]


def test_popularity_is_measured_and_hot_adapters_spread_over_idle_replicas():
    router, view = PopularityPlacement(HashRing(10)), make_view(10)
    rng = np.random.default_rng(1)
    hot: list[int] = []
    for _ in range(4000):
        adapter = 0 if rng.random() < 0.3 else int(rng.integers(1, 2000))
        chosen = router.choose(adapter, view)
        view.in_flight[chosen] += 1
        hot += [chosen] if adapter == 0 else []
    assert set(hot[-1000:]) == set(range(10))
    assert max(view.in_flight) < 1.05 * 400


def test_what_popularity_was_told_counts_as_measured():
    router = PopularityPlacement(HashRing(10))
    router.learn([0.5, *[0.5 / 99] * 99])
    view = make_view(10)
    for _ in range(100):
        view.in_flight[router.choose(0, view)] += 1
    assert view.in_flight == [10] * 10


def test_the_gateway_scores_adapters_as_its_lora_scorer_does():
    full = replace(EMPTY, ready=("a", "b"), waited_for=("c",), max_adapters=3)
    assert lora_score("a", full) == 1.0
    assert lora_score("c", full) == 0.6
    assert lora_score("d", full) == 0.0
    assert lora_score("d", replace(full, max_adapters=4)) == 0.8


def test_the_gateway_prefers_the_replica_that_has_the_adapter_unless_its_queue_is_long():
    view = make_view(3)
    ready = replace(EMPTY, ready=(adapter_id(7),))
    view.reports = [EMPTY, ready, EMPTY]
    assert {GatewayPicker(seed=s).choose(7, view) for s in range(20)} == {1}
    view.reports = [EMPTY, replace(ready, num_waiting=9), EMPTY]
    assert {GatewayPicker(seed=s).choose(7, view) for s in range(20)} == {0, 2}


@pytest.mark.parametrize("name", ROUTERS)
def test_no_policy_chooses_the_dead_and_homes_are_alive(name):
    router, view = make_router(name, 6, 1), make_view(6, dead=(0, 4))
    for adapter in range(200):
        chosen = router.choose(adapter % 20, view)
        view.in_flight[chosen] += 1
        assert chosen in view.alive
        assert set(router.homes(adapter, 0.001, view.alive)) <= set(view.alive)
    assert all(view.in_flight[i] for i in view.alive)


@pytest.mark.parametrize(
    "name", ["random", "round-robin", "least-loaded", "gateway", "gateway-lora"]
)
def test_policies_without_a_home_spread_even_one_adapter(name):
    router, view = make_router(name, 5, 1), make_view(5)
    for _ in range(500):
        view.in_flight[router.choose(7, view)] += 1
    assert min(view.in_flight) > 50
