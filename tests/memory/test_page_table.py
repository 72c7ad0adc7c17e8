"""How a sequence comes by its pages, shares them and gives them back."""

from __future__ import annotations

import random

import pytest

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.allocator import PageUse
from loraplex_memory.errors import OutOfPages
from loraplex_memory.eviction import LeastRecentlyUsed
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_memory.page_table import PrefixMatch

LAYOUT = PoolLayout(ModelGeometry(1, 64, 4, 2, 16, 128), page_tokens=4)
PROMPT = list(range(100, 112))


class Costs:
    """Loading and computing a page cost the same."""

    def adapter_s(self, num_pages: int) -> float:
        return 1.0 * num_pages

    def prefix_page_s(self) -> float:
        return 1.0


@pytest.fixture
def accounts() -> PoolAccounts:
    return PoolAccounts(LAYOUT, 12, eviction=LeastRecentlyUsed(), costs=Costs())


def test_it_grows_by_whole_pages_and_gives_all_back(accounts):
    table = accounts.new_table(None)
    assert (table.capacity, table.pages_missing(1), table.pages_missing(9)) == (0, 1, 3)
    table.grow(9)
    assert (table.capacity, table.pages_missing(12), table.pages_missing(13)) == (12, 0, 1)
    table.grow(5)
    assert len(table.pages) == 3
    table.release()
    assert (accounts.num_free, len(table.pages)) == (12, 0)


def test_a_table_that_cannot_grow_stays_as_it_was(accounts):
    table = accounts.new_table(None)
    table.grow(8)
    before = list(table.pages)
    with pytest.raises(OutOfPages):
        table.grow(49)
    assert list(table.pages) == before


def test_matching_takes_nothing_and_adopting_takes_idle_pages_from_the_evictable(accounts):
    first = accounts.new_table(None)
    first.grow(12)
    first.publish(PROMPT, 12, may_replace=False)
    second = accounts.new_table(None)
    assert second.match(PROMPT, 12) == PrefixMatch(num_tokens=12, num_idle_pages=0)
    third = accounts.new_table(None)
    third.adopt(PROMPT, 4)
    first.release()
    assert second.match(PROMPT, 12) == PrefixMatch(num_tokens=12, num_idle_pages=2)
    assert accounts.num_evictable() == 2
    assert second.adopt(PROMPT, 12) == 12
    assert accounts.num_evictable() == 0
    accounts.check()


def test_pages_behind_what_may_be_shared_are_neither_published_nor_found(accounts):
    table = accounts.new_table(None, max_shared=10)
    table.grow(12)
    table.publish(PROMPT, 12, may_replace=True)
    assert table.num_shared == 2
    everything = accounts.new_table(None)
    assert everything.match(PROMPT, 12).num_tokens == 8
    assert accounts.new_table(None, max_shared=7).match(PROMPT, 12).num_tokens == 4
    assert accounts.new_table(None, max_shared=3).adopt(PROMPT, 12) == 0
    table.release()
    accounts.check()


def test_at_most_the_allowed_tokens_are_adopted(accounts):
    table = accounts.new_table(None)
    table.grow(12)
    table.publish(PROMPT, 12, may_replace=False)
    again = accounts.new_table(None)
    assert again.match(PROMPT, 11).num_tokens == 8
    assert again.adopt(PROMPT, 11) == 8
    assert (again.num_shared, list(again.pages)) == (2, list(table.pages[:2]))
    again.grow(12)
    assert again.pages[2] != table.pages[2]


def test_only_whole_pages_are_published(accounts):
    table = accounts.new_table(None)
    table.grow(12)
    table.publish(PROMPT, 7, may_replace=False)
    assert table.num_shared == 1
    assert accounts.allocator.num_held(PageUse.PREFIX) == 1
    table.publish(PROMPT, 8, may_replace=False)
    assert table.num_shared == 2
    accounts.check()


def test_pages_of_a_drafted_step_keep_their_owner(accounts):
    first, second = accounts.new_table(None), accounts.new_table(None)
    for table in (first, second):
        table.grow(12)
    first.publish(PROMPT, 8, may_replace=False)
    before = list(second.pages)
    second.publish(PROMPT, 12, may_replace=False)
    assert (second.num_shared, list(second.pages)) == (0, before)
    second.publish(PROMPT, 12, may_replace=True)
    assert second.num_shared == 3
    assert list(second.pages) == [*first.pages[:2], before[2]]
    assert accounts.num_free == 12 - 4
    # The last page of the first is now the duplicate.
    first.publish(PROMPT, 12, may_replace=True)
    assert list(first.pages) == list(second.pages)
    assert accounts.num_free == 12 - 3
    accounts.check()


def test_tokens_without_a_page_cannot_be_published(accounts):
    table = accounts.new_table(None)
    table.grow(4)
    with pytest.raises(AssertionError, match="without a page"):
        table.publish(PROMPT, 8, may_replace=False)


def test_a_table_with_pages_adopts_nothing(accounts):
    table = accounts.new_table(None)
    table.grow(4)
    with pytest.raises(AssertionError, match="empty table"):
        table.adopt(PROMPT, 8)


def test_a_released_table_can_start_again_with_its_own_pages(accounts):
    table = accounts.new_table("a")
    table.grow(12)
    table.publish(PROMPT, 12, may_replace=True)
    pages = list(table.pages)
    table.release()
    assert accounts.num_free == 9
    assert table.adopt(PROMPT, 11) == 8
    assert list(table.pages) == pages[:2]


def test_thousands_of_prompts_leave_the_accounts_true():
    rng = random.Random(7)
    accounts = PoolAccounts(LAYOUT, 200, eviction=LeastRecentlyUsed(), costs=Costs())
    running = []
    for now in range(3000):
        accounts.clock.set(float(now))
        prompt = [rng.randint(0, 2) for _ in range(rng.randint(1, 40))]
        table = accounts.new_table(rng.choice((None, "a", "b")))
        table.adopt(prompt, len(prompt) - 1)
        while not accounts.try_make_free(table.pages_missing(len(prompt))):
            running.pop(0).release()
        table.grow(len(prompt))
        table.publish(prompt, len(prompt), may_replace=True)
        running.append(table)
        if now % 300 == 0:
            accounts.check()
    for table in running:
        table.release()
    accounts.check()
    assert accounts.num_free + accounts.num_evictable() == 200
