"""Who leaves when pages are short, under each policy, and what that costs."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from itertools import accumulate

import pytest

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.clock import GivenClock
from loraplex_memory.eviction import CostAware, DropUnused, EvictionPolicy, LeastRecentlyUsed
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_memory.lazy_heap import MIN_GARBAGE
from loraplex_memory.usage import UseHistory, add_scores

LAYOUT = PoolLayout(ModelGeometry(1, 64, 4, 2, 16, 128), page_tokens=4)


@dataclass
class Costs:
    """Seconds per page, and per adapter beside its pages."""

    adapter_page_s: float = 2e-4
    prefix_s: float = 4e-4
    load_s: float = 1e-3

    def adapter_s(self, num_pages: int) -> float:
        return self.load_s + self.adapter_page_s * num_pages

    def prefix_page_s(self) -> float:
        return self.prefix_s


def make_accounts(
    policy: EvictionPolicy, num_pages: int = 40, costs: Costs | None = None
) -> PoolAccounts:
    return PoolAccounts(LAYOUT, num_pages, eviction=policy, costs=costs or Costs())


def load(accounts: PoolAccounts, adapter_id: str, num_pages: int, num_requests: int = 0) -> None:
    for _ in range(num_requests):
        accounts.residency.expect(adapter_id)
    accounts.residency.begin_load(adapter_id, num_pages)
    accounts.residency.finish_load(adapter_id)


def leave_prefix(accounts: PoolAccounts, token_ids: list[int], times: int = 1) -> None:
    for _ in range(times):
        table = accounts.new_table(None)
        table.adopt(token_ids, len(token_ids))
        table.grow(len(token_ids))
        table.publish(token_ids, len(token_ids), may_replace=True)
        table.release()


# ---- policies --------------------------------------------------------------------------------


def test_the_less_popular_adapter_leaves_though_it_was_used_last():
    accounts = make_accounts(CostAware())
    load(accounts, "popular", 4, num_requests=3)
    accounts.clock.set(10.0)
    load(accounts, "rare", 4, num_requests=1)
    accounts.evict(1)
    assert accounts.residency.resident_ids() == ["popular"]


def test_popularity_fades():
    accounts = make_accounts(CostAware(adapter_half_life_s=100.0))
    load(accounts, "popular", 4, num_requests=3)
    accounts.clock.set(200.0)
    assert accounts.residency.popularity("popular") == pytest.approx(0.75)
    load(accounts, "rare", 4, num_requests=1)
    accounts.evict(1)
    assert accounts.residency.resident_ids() == ["rare"]


def test_popularity_outlives_residency():
    accounts = make_accounts(CostAware())
    load(accounts, "popular", 4, num_requests=5)
    accounts.evict(4)
    load(accounts, "popular", 4)
    load(accounts, "rare", 4, num_requests=2)
    accounts.evict(1)
    assert accounts.residency.resident_ids() == ["popular"]


def test_of_equally_popular_adapters_the_one_cheaper_to_load_per_page_leaves():
    accounts = make_accounts(CostAware(), costs=Costs(load_s=1.0))
    load(accounts, "small", 2, num_requests=1)
    load(accounts, "large", 20, num_requests=1)
    accounts.evict(1)
    assert accounts.residency.resident_ids() == ["small"]


@pytest.mark.parametrize(("prefix_s", "stays"), [(1.0, "prefix"), (1e-9, "adapter")])
def test_adapters_and_prefixes_compete_by_what_they_cost_to_restore(prefix_s, stays):
    accounts = make_accounts(CostAware(), costs=Costs(prefix_s=prefix_s))
    load(accounts, "a", 2, num_requests=2)
    leave_prefix(accounts, [1, 2, 3, 4], times=2)
    accounts.evict(1)
    assert accounts.residency.is_resident("a") == (stays == "adapter")
    assert accounts.prefixes.num_nodes == (stays == "prefix")


def test_a_prefix_fades_faster_than_an_adapter():
    policy = CostAware(adapter_half_life_s=300.0, prefix_half_life_s=60.0)
    for waits_s, stays in ((1.0, "prefix"), (600.0, "adapter")):
        accounts = make_accounts(policy, costs=Costs(1.0, 1.0, 0.0))
        load(accounts, "a", 1, num_requests=1)
        leave_prefix(accounts, [1, 2, 3, 4], times=2)
        accounts.clock.set(waits_s)
        accounts.evict(1)
        assert accounts.residency.is_resident("a") == (stays == "adapter")


def test_a_prefix_that_was_found_outlives_one_that_was_not():
    accounts = make_accounts(CostAware())
    leave_prefix(accounts, [1] * 4, times=2)
    accounts.clock.set(1.0)
    leave_prefix(accounts, [2] * 4)
    accounts.evict(1)
    assert accounts.new_table(None).match([1] * 4, 4).num_tokens == 4


def test_least_recently_used_looks_at_nothing_but_time():
    accounts = make_accounts(LeastRecentlyUsed(), costs=Costs(prefix_s=100.0))
    leave_prefix(accounts, [1] * 4, times=9)
    accounts.clock.set(1.0)
    load(accounts, "a", 2, num_requests=9)
    accounts.clock.set(2.0)
    load(accounts, "b", 2)
    assert accounts.evict(1) == 1
    assert accounts.prefixes.num_nodes == 0
    assert accounts.evict(1) == 2
    assert accounts.residency.resident_ids() == ["b"]


# ---- the heap --------------------------------------------------------------------------------


def test_a_spared_adapter_is_evicted_once_it_is_spared_no_more():
    accounts = make_accounts(LeastRecentlyUsed())
    for now, name in enumerate("abc"):
        accounts.clock.set(now)
        load(accounts, name, 2)
    spared = {"a", "b"}
    assert accounts.evict(1, spared) == 2
    assert accounts.residency.resident_ids() == ["a", "b"]
    assert accounts.evict(1, spared) == 0
    accounts.check()
    accounts.residency.pin("a")
    accounts.residency.unpin("a")
    accounts.check()
    assert accounts.evict(1, {"a"}) == 2
    assert accounts.residency.resident_ids() == ["a"]
    accounts.residency.discard("a")
    accounts.check()


def test_a_spared_adapter_that_became_cheaper_leaves_in_its_new_place():
    costs = Costs(load_s=1.0)
    accounts = make_accounts(CostAware(), costs=costs)
    load(accounts, "a", 2, num_requests=1)
    assert accounts.evict(1, {"a"}) == 0
    costs.load_s = 0.01
    accounts.residency.pin("a")
    accounts.residency.unpin("a")
    costs.load_s = 0.1
    load(accounts, "b", 2, num_requests=1)
    accounts.check()
    accounts.evict(1)
    assert accounts.residency.resident_ids() == ["b"]


def test_using_things_without_end_leaves_no_garbage():
    accounts = make_accounts(CostAware(), num_pages=60)
    evictor = accounts._evictor
    for name in "ab":
        load(accounts, name, 1)
    for now in range(3000):
        accounts.clock.set(float(now))
        accounts.residency.pin("a")
        accounts.residency.unpin("a")
        prefix = [now % 7] * 8
        table = accounts.new_table("b")
        accounts.try_make_free(2)
        table.adopt(prefix, 8)
        table.grow(8)
        table.publish(prefix, 8, may_replace=True)
        table.release()
        accounts.residency.discard("b")  # its prefixes become orphans, at lower keys
        load(accounts, "b", 1)
        assert len(evictor.adapters) <= 2 + MIN_GARBAGE + 1
        assert len(evictor.prefixes) <= 2 * (14 + MIN_GARBAGE)
    accounts.check()


def test_an_eviction_of_the_same_accounts_is_the_same():
    orders = []
    for _ in range(2):
        accounts = make_accounts(CostAware())
        for i in range(20):
            load(accounts, f"x{i}", 1, num_requests=1)
        accounts.evict(1, {f"x{i}" for i in range(0, 20, 2)})
        accounts.evict(10)
        orders.append(accounts.residency.resident_ids())
    assert orders[0] == orders[1]
    assert len(orders[0]) == 9


# ---- scores ----------------------------------------------------------------------------------


def test_scores_add_up_like_the_counts_they_stand_for():
    assert add_scores(3.0, 1.0) == add_scores(1.0, 3.0) == pytest.approx(3.321928)
    assert add_scores(5000.0, 0.0) == 5000.0


def test_the_history_forgets_the_least_used_of_those_named_longest_ago():
    clock = GivenClock()
    history = UseHistory(clock, half_life_s=100.0, max_ids=10)
    history.add("often")
    history.add("often")
    for i in range(1000):
        clock.set(i * 1e-3)
        history.add(f"once{i}")
        assert len(history) <= 10
    assert history.count("often") > 1.9
    assert history.count("once0") == 0.0


# ---- what it is for --------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """A request of a trace."""

    arrival_s: float
    adapter_idx: int
    token_ids: tuple[int, ...]


def make_trace(num_requests: int, chat_share: float, seed: int) -> list[Visit]:
    """Zipf(1.0) over 200 adapters, 5 arrivals/s; some start chats of 2 to 6 turns, 20 s apart.

    All requests for an adapter start with its system prompt of 0 to 12 pages; a turn of a chat
    repeats the turns before it.
    """
    rng, visits, now, serial = random.Random(seed), [], 0.0, 0
    weights = list(accumulate(1.0 / (i + 1) for i in range(200)))
    for _ in range(num_requests):
        now += rng.expovariate(5.0)
        adapter_idx = rng.choices(range(200), cum_weights=weights)[0]
        token_ids = tuple(-(adapter_idx * 1000 + i) for i in range(adapter_idx % 7 * 8))
        turn_s, num_tokens = now, rng.randint(4, 40) * 4
        for _ in range(rng.randint(2, 6) if rng.random() < chat_share else 1):
            serial += 1
            token_ids += tuple(range(serial * 1000, serial * 1000 + num_tokens))
            visits.append(Visit(turn_s, adapter_idx, token_ids))
            turn_s, num_tokens = turn_s + 1.0 + rng.expovariate(1 / 20), rng.randint(4, 20) * 4
    return sorted(visits, key=lambda v: v.arrival_s)[:num_requests]


def restore_s(policy: EvictionPolicy, costs: Costs, trace: list[Visit]) -> float:
    """Serve the trace, 3 s each; return the seconds for loads and for pages computed again."""
    accounts = make_accounts(policy, 4000, costs)
    running: list = []
    total, seen = 0.0, set()

    def finish_one() -> None:
        end_s, _, table, adapter_id = heapq.heappop(running)
        accounts.clock.set(end_s)
        table.release()
        accounts.residency.unpin(adapter_id)
        accounts.drop_unused()

    for i, visit in enumerate(trace):
        while running and running[0][0] <= visit.arrival_s:
            finish_one()
        accounts.clock.set(visit.arrival_s)
        adapter_id, num_tokens = f"a{visit.adapter_idx}", len(visit.token_ids)
        accounts.residency.expect(adapter_id)
        if not accounts.residency.is_resident(adapter_id):
            num_pages = (4, 8, 16, 32)[visit.adapter_idx % 4]
            while not accounts.try_make_free(num_pages):
                finish_one()
            load(accounts, adapter_id, num_pages)
            total += costs.adapter_s(num_pages)
        accounts.residency.pin(adapter_id)
        table = accounts.new_table(adapter_id)
        num_found = table.adopt(visit.token_ids, num_tokens - 1)
        while not accounts.try_make_free(table.pages_missing(num_tokens)):
            finish_one()
        table.grow(num_tokens)
        table.publish(visit.token_ids, num_tokens, may_replace=True)
        heapq.heappush(running, (visit.arrival_s + 3.0, i, table, adapter_id))
        # The trace names every token uniquely, so the last one of a page tells all before it.
        ends = {(adapter_id, visit.token_ids[k]) for k in range(num_found + 3, num_tokens, 4)}
        total += len(ends & seen) * costs.prefix_s
        seen |= ends
    accounts.check()
    return total


@pytest.mark.parametrize(
    ("costs", "chat_share", "bound"),
    [
        (Costs(adapter_page_s=2e-5), 0.2, 0.95),  # loads from host memory are cheap
        (Costs(adapter_page_s=2e-4), 0.2, 0.95),
        (Costs(adapter_page_s=2e-3), 0.2, 0.65),  # from a disk
        (Costs(adapter_page_s=2e-3), 0.7, 0.80),
    ],
)
def test_knowing_costs_restores_less_than_recency_and_recency_than_dropping(
    costs, chat_share, bound
):
    trace = make_trace(2000, chat_share, seed=1)
    cost_aware = restore_s(CostAware(), costs, trace)
    recency = restore_s(LeastRecentlyUsed(), costs, trace)
    dropping = restore_s(DropUnused(), costs, trace)
    print(f"seconds to restore: {cost_aware:.2f}, {recency:.2f} by LRU, {dropping:.2f} dropping")
    assert cost_aware < bound * recency
    assert recency < dropping
