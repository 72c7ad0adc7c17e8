"""Who finds which pages, and what becomes of them when nobody uses them."""

from __future__ import annotations

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.allocator import PageUse
from loraplex_memory.eviction import CostAware, LeastRecentlyUsed
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_memory.page_table import PageTable
from loraplex_memory.usage import ReturnOdds

LAYOUT = PoolLayout(ModelGeometry(1, 64, 4, 2, 16, 128), page_tokens=4)


class Costs:
    """Loading and computing a page cost the same."""

    def adapter_s(self, num_pages: int) -> float:
        return 1.0 * num_pages

    def prefix_page_s(self) -> float:
        return 1.0


def make_accounts(num_pages: int = 40, *, has_prefix_cache: bool = True) -> PoolAccounts:
    return PoolAccounts(
        LAYOUT,
        num_pages,
        eviction=LeastRecentlyUsed(),
        costs=Costs(),
        has_prefix_cache=has_prefix_cache,
    )


def run(
    accounts: PoolAccounts, adapter_id: str | None, token_ids: list[int], salt: str = ""
) -> PageTable:
    """Adopt what there is, compute the rest, publish it."""
    table = accounts.new_table(adapter_id, salt=salt)
    table.adopt(token_ids, len(token_ids))
    table.grow(len(token_ids))
    table.publish(token_ids, len(token_ids), may_replace=True)
    return table


def tokens_found(accounts: PoolAccounts, adapter_id: str | None, token_ids: list[int]) -> int:
    return accounts.new_table(adapter_id).match(token_ids, len(token_ids)).num_tokens


def test_other_salts_find_nothing_and_everything_is_one_adapters():
    accounts = make_accounts()
    tables = [run(accounts, "a", list(range(10)), salt) for salt in ("", "acme", "zeta")]
    assert [t.num_shared for t in tables] == [2, 2, 2]
    assert len({page for table in tables for page in table.pages[:2]}) == 6
    again = accounts.new_table("a", salt="zeta")
    assert again.adopt(list(range(10)), 10) == 8
    assert again.pages == tables[2].pages[:2]
    assert accounts.new_table("a", salt="omega").match(list(range(10)), 10).num_tokens == 0
    assert accounts.new_table("b", salt="acme").match(list(range(10)), 10).num_tokens == 0
    assert accounts.prefixes.pages_by_adapter() == {"a": 6}
    accounts.check()
    for table in tables[:2]:
        table.release()
    accounts.discard_adapter("a")
    accounts.check()
    assert accounts.prefixes.pages_by_adapter() == {"a": 2}  # whose users are still there
    again.release()
    tables[2].release()
    accounts.check()
    assert accounts.allocator.num_free == accounts.allocator.num_pages


def test_pages_of_every_salt_are_evicted_when_the_space_is_needed():
    accounts = make_accounts(num_pages=6)
    for salt in ("acme", "zeta", "omega"):
        run(accounts, "a", list(range(8)), salt).release()
    assert accounts.try_make_free(6)
    accounts.check()
    assert accounts.prefixes.pages_by_adapter() == {}


def test_the_longest_run_of_whole_pages_is_found():
    accounts = make_accounts()
    run(accounts, None, list(range(10)))
    assert tokens_found(accounts, None, list(range(10))) == 8
    assert tokens_found(accounts, None, [*range(4), 99, *range(5, 10)]) == 4
    assert tokens_found(accounts, None, [99, *range(1, 10)]) == 0
    assert tokens_found(accounts, None, list(range(4, 12))) == 0


def test_nothing_is_found_across_adapters():
    accounts = make_accounts()
    prompt = list(range(8))
    run(accounts, "a", prompt)
    assert tokens_found(accounts, "a", prompt) == 8
    assert tokens_found(accounts, "b", prompt) == tokens_found(accounts, None, prompt) == 0
    run(accounts, None, prompt)
    run(accounts, "b", prompt[:4])
    assert accounts.prefixes.pages_by_adapter() == {"a": 2, "b": 1, None: 2}
    assert accounts.allocator.num_held(PageUse.PREFIX) == 5


def test_a_switched_off_cache_keeps_and_finds_nothing():
    accounts = make_accounts(has_prefix_cache=False)
    table = run(accounts, None, list(range(8)))
    assert (table.num_shared, tokens_found(accounts, None, list(range(8)))) == (0, 0)
    table.release()
    assert accounts.num_free == 40
    accounts.check()


def test_pages_in_use_are_never_evicted_and_idle_ones_leave_from_the_end():
    accounts = make_accounts(8)
    short, long = run(accounts, None, list(range(8))), run(accounts, None, list(range(16)))
    long.release()
    assert accounts.num_evictable() == 2
    assert accounts.evict(1) == 1
    assert tokens_found(accounts, None, list(range(16))) == 12
    assert accounts.evict(9) == 1
    assert tokens_found(accounts, None, list(range(16))) == 8
    short.release()
    assert accounts.evict(9) == 2
    assert accounts.num_prefix_evictions == 4
    accounts.check()


def test_a_branch_keeps_what_it_shares_alive():
    accounts = make_accounts()
    run(accounts, None, [*range(8), 1, 1, 1, 1]).release()
    accounts.clock.set(1.0)
    run(accounts, None, [*range(8), 2, 2, 2, 2]).release()
    assert accounts.prefixes.num_nodes == 4
    accounts.evict(1)
    assert tokens_found(accounts, None, [*range(8), 1, 1, 1, 1]) == 8
    assert tokens_found(accounts, None, [*range(8), 2, 2, 2, 2]) == 12


def test_a_dropped_adapter_is_not_found_and_its_used_pages_go_when_released():
    accounts = make_accounts()
    prompt = list(range(12))
    running = run(accounts, "a", prompt[:8])
    run(accounts, "a", prompt).release()
    accounts.discard_adapter("a")
    assert tokens_found(accounts, "a", prompt) == 0
    assert accounts.prefixes.pages_by_adapter() == {"a": 2}
    accounts.check()
    running.grow(12)
    running.publish(prompt, 12, may_replace=True)
    assert running.num_shared == 2, "nobody could find that page"
    fresh = run(accounts, "a", prompt)
    assert not set(fresh.pages) & set(running.pages)
    running.release()
    accounts.check()
    assert accounts.prefixes.pages_by_adapter() == {"a": 3}
    assert tokens_found(accounts, "a", prompt) == 12


def test_prefixes_of_an_absent_adapter_leave_first_and_recover_with_it():
    for comes_back in (False, True):
        accounts = PoolAccounts(LAYOUT, 40, eviction=CostAware(), costs=Costs())
        for name in "ab":
            accounts.residency.begin_load(name, 1)
            accounts.residency.finish_load(name)
        accounts.residency.pin("b")
        for now, name in enumerate("baba"):  # each is found once, those of `a` later
            accounts.clock.set(now)
            run(accounts, name, list(range(8))).release()
        accounts.residency.discard("a")
        accounts.check()
        if comes_back:
            accounts.residency.begin_load("a", 1)
        accounts.evict(2)
        left = (
            tokens_found(accounts, "a", list(range(8))),
            tokens_found(accounts, "b", list(range(8))),
        )
        assert left == ((8, 0) if comes_back else (0, 8))
        accounts.check()


def test_pages_are_ranked_lower_as_soon_as_their_adapter_leaves():
    accounts = PoolAccounts(LAYOUT, 40, eviction=CostAware(), costs=Costs())
    accounts.residency.begin_load("a", 1)
    accounts.residency.finish_load("a")
    run(accounts, "a", list(range(8))).release()
    (leaf,) = accounts.prefixes.idle_leaves()
    before = leaf.entry_key
    accounts.residency.discard("a")
    assert leaf.entry_key < before
    accounts.check()


def test_what_was_evicted_and_is_asked_for_again_raises_the_odds_of_new_pages():
    odds = ReturnOdds(max_evicted=3)
    for chain in range(40):
        assert not odds.made(chain)
    low = odds.odds
    for chain in range(4):
        odds.evicted(chain, was_hit=False)
    assert not odds.made(0), "forgotten, as more were evicted than are remembered"
    assert odds.made(1)
    assert odds.odds > low
    raised = odds.odds
    odds.evicted(1, was_hit=True)
    assert odds.made(1)
    assert odds.odds == raised, "the same page must not count twice"


def test_the_odds_follow_the_traffic():
    odds = ReturnOdds(window=100)
    for chain in range(1000):
        odds.made(chain)
        odds.returned()
    assert odds.odds > 0.9
    for chain in range(1000, 2000):
        odds.made(chain)
    assert odds.odds < 0.05
