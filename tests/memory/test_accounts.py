"""The accounts of the pool: hypothesis tries to lose, double, misfile or mix up a page."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.allocator import PageAllocator, PageUse
from loraplex_memory.errors import OutOfPages
from loraplex_memory.eviction import CostAware, DropUnused, EvictionPolicy, LeastRecentlyUsed
from loraplex_memory.layout import ModelGeometry, PoolLayout
from loraplex_memory.page_table import PageTable
from loraplex_memory.residency import ResidencyState

PAGES = 20
PAGE_TOKENS = 2
LAYOUT = PoolLayout(ModelGeometry(1, 64, 4, 2, 16, 128), PAGE_TOKENS)
ADAPTERS = ("a", "b", "c")
POLICIES: tuple[EvictionPolicy, ...] = (CostAware(), LeastRecentlyUsed(), DropUnused())


class Costs:
    """A load costs 1 s and 0.1 s per page; a prefix page 0.5 s until told otherwise."""

    def __init__(self) -> None:
        self.page_s = 0.5

    def adapter_s(self, num_pages: int) -> float:
        return 1.0 + 0.1 * num_pages

    def prefix_page_s(self) -> float:
        return self.page_s


def make_accounts(
    num_pages: int = PAGES, policy: EvictionPolicy | None = None, costs: Costs | None = None
) -> PoolAccounts:
    return PoolAccounts(
        LAYOUT, num_pages, eviction=policy or LeastRecentlyUsed(), costs=costs or Costs()
    )


def load(accounts: PoolAccounts, adapter_id: str, num_pages: int) -> None:
    accounts.residency.begin_load(adapter_id, num_pages)
    accounts.residency.finish_load(adapter_id)


def test_a_page_freed_twice_is_caught():
    allocator = PageAllocator(2)
    pages = allocator.alloc(1, PageUse.KV)
    allocator.free(pages)
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free(pages)


def test_only_a_page_held_for_one_use_can_be_given_another():
    allocator = PageAllocator(2)
    with pytest.raises(ValueError, match="serves no kv use"):
        allocator.reassign([0], PageUse.KV, PageUse.PREFIX)


def test_a_refused_allocation_takes_nothing():
    allocator = PageAllocator(3)
    with pytest.raises(OutOfPages) as caught:
        allocator.alloc(4, PageUse.KV)
    assert (caught.value.requested, caught.value.available) == (4, 3)
    assert allocator.num_free == 3


def test_any_freed_page_serves_either_use():
    allocator = PageAllocator(4)
    kv = allocator.alloc(4, PageUse.KV)
    allocator.free(kv[::2])  # the holes are not next to each other
    assert sorted(allocator.alloc(2, PageUse.ADAPTER)) == sorted(kv[::2])
    allocator.check()


def test_eviction_takes_the_least_recently_used_and_spares_the_pinned():
    accounts = make_accounts(9)
    for now, name in enumerate("abc"):
        accounts.clock.set(now)
        load(accounts, name, 3)
    accounts.clock.set(5.0)
    accounts.residency.pin("a")
    accounts.residency.unpin("a")
    accounts.residency.pin("b")
    assert accounts.num_evictable() == 6
    assert accounts.num_evictable({"c", "b", "unknown"}) == 3
    assert accounts.evict(1, {"c"}) == 3
    assert accounts.residency.resident_ids() == ["c", "b"]
    assert accounts.evict(9) == 3
    assert accounts.residency.resident_ids() == ["b"]
    assert accounts.num_adapter_evictions == 2


def test_making_room_that_cannot_be_had_evicts_nothing():
    accounts = make_accounts(9)
    load(accounts, "a", 3)
    load(accounts, "b", 3)
    accounts.residency.pin("b")
    assert not accounts.try_make_free(7)
    assert not accounts.try_make_free(4, {"a"})
    assert accounts.residency.is_resident("a")
    assert accounts.try_make_free(3)
    assert accounts.residency.is_resident("a")
    assert accounts.try_make_free(6)
    assert not accounts.residency.is_resident("a")


def test_a_discarded_adapter_leaves_at_its_last_unpin():
    accounts = make_accounts(3)
    residency = accounts.residency
    residency.begin_load("a", 2)
    accounts.discard_adapter("a")
    assert residency.state("a") is ResidencyState.LOADING
    residency.keep("a")
    residency.finish_load("a")
    residency.pin("a")
    accounts.discard_adapter("a")
    assert residency.is_resident("a")
    residency.unpin("a")
    assert residency.state("a") is None
    accounts.check()


def test_only_a_policy_that_drops_the_unused_does_so():
    for policy, left in ((LeastRecentlyUsed(), ["a", "b", "c"]), (DropUnused(), ["b", "c"])):
        accounts = make_accounts(policy=policy)
        for name in "abc":
            load(accounts, name, 2)
        accounts.residency.pin("b")
        accounts.drop_unused({"c"})
        assert sorted(accounts.residency.resident_ids()) == left
        accounts.check()


@dataclass(eq=False)
class Life:
    """A sequence while it runs."""

    adapter_id: str | None
    token_ids: list[int]
    table: PageTable


Content = tuple[str | None, tuple[int, ...]]


class Accounts(RuleBasedStateMachine):
    """Sequences, prefixes and adapters come and go in one pool of twenty pages.

    `content` is what each page was last written with: adapter, and all tokens up to its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lives: list[Life] = []
        self.content: dict[int, Content] = {}

    @initialize(policy=st.sampled_from(POLICIES))
    def make_pool(self, policy: EvictionPolicy) -> None:
        self.costs = Costs()
        self.accounts = make_accounts(PAGES, policy, self.costs)

    # ---- sequences ---------------------------------------------------------------------------

    @rule(
        adapter_id=st.sampled_from((None, *ADAPTERS)),
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        short_by=st.integers(0, 2),
    )
    def start_sequence(self, adapter_id: str | None, token_ids: list[int], short_by: int) -> None:
        residency = self.accounts.residency
        if adapter_id:
            residency.expect(adapter_id)
            if not residency.is_resident(adapter_id):
                return
            residency.pin(adapter_id)
        table = self.accounts.new_table(adapter_id)
        limit = len(token_ids) - short_by
        match, evictable = table.match(token_ids, limit), self.accounts.num_evictable()
        assert table.adopt(token_ids, limit) == match.num_tokens <= max(0, limit)
        assert self.accounts.num_evictable() == evictable - match.num_idle_pages
        for i, page in enumerate(table.pages):
            wanted = (adapter_id, tuple(token_ids[: (i + 1) * PAGE_TOKENS]))
            assert self.content[page] == wanted, "a page with something else was found"
        self.lives.append(Life(adapter_id, token_ids, table))

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=4), makes_room=st.booleans())
    def compute(self, data: st.DataObject, more: list[int], makes_room: bool) -> None:
        """Grow to all tokens there are and write the pages that were not adopted."""
        life = data.draw(st.sampled_from(self.lives))
        table, token_ids = life.table, life.token_ids + more
        if makes_room:
            self.accounts.try_make_free(table.pages_missing(len(token_ids)))
        before = list(table.pages)
        try:
            table.grow(len(token_ids))
        except OutOfPages:
            assert list(table.pages) == before
            return
        life.token_ids = token_ids
        for i in range(table.num_shared, len(table.pages)):
            content = (life.adapter_id, tuple(token_ids[: (i + 1) * PAGE_TOKENS]))
            self.content[table.pages[i]] = content

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), may_replace=st.booleans())
    def publish(self, data: st.DataObject, may_replace: bool) -> None:
        life = data.draw(st.sampled_from(self.lives))
        table, before = life.table, list(life.table.pages)
        num_tokens = data.draw(st.integers(0, min(len(life.token_ids), table.capacity)))
        table.publish(life.token_ids, num_tokens, may_replace=may_replace)
        assert may_replace or list(table.pages) == before, "a page of a drafted step changed hands"
        assert len(table.pages) == len(before)
        for i in range(table.num_shared):
            content = (life.adapter_id, tuple(life.token_ids[: (i + 1) * PAGE_TOKENS]))
            assert self.content[table.pages[i]] == content, "a page was replaced by something else"

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), publishes=st.booleans())
    def end_sequence(self, data: st.DataObject, publishes: bool) -> None:
        life = data.draw(st.sampled_from(self.lives))
        self.lives.remove(life)
        if publishes:
            num_tokens = min(len(life.token_ids), life.table.capacity)
            life.table.publish(life.token_ids, num_tokens, may_replace=True)
        life.table.release()
        assert not life.table.pages
        if life.adapter_id:
            self.accounts.residency.unpin(life.adapter_id)
        self.accounts.drop_unused()

    # ---- adapters ----------------------------------------------------------------------------

    @rule(adapter_id=st.sampled_from(ADAPTERS), num_pages=st.integers(0, 8))
    def begin_load(self, adapter_id: str, num_pages: int) -> None:
        if self.accounts.residency.state(adapter_id) is not None:
            return
        before = self.accounts.num_free
        try:
            pages = self.accounts.residency.begin_load(adapter_id, num_pages)
        except OutOfPages:
            assert self.accounts.num_free == before
            return
        for page in pages:
            self.content.pop(page, None)

    @precondition(lambda self: self.accounts.residency.loading_ids())
    @rule(data=st.data(), succeeds=st.booleans())
    def end_load(self, data: st.DataObject, succeeds: bool) -> None:
        residency = self.accounts.residency
        adapter_id = data.draw(st.sampled_from(residency.loading_ids()))
        (residency.finish_load if succeeds else residency.fail_load)(adapter_id)

    @rule(adapter_id=st.sampled_from(ADAPTERS))
    def discard(self, adapter_id: str) -> None:
        self.accounts.discard_adapter(adapter_id)
        table = self.accounts.new_table(adapter_id)
        assert table.match([0, 0], 2).num_tokens == table.match([1, 1], 2).num_tokens == 0

    @rule(adapter_id=st.sampled_from(ADAPTERS))
    def keep(self, adapter_id: str) -> None:
        self.accounts.residency.keep(adapter_id)

    # ---- room --------------------------------------------------------------------------------

    @rule(num_pages=st.integers(0, PAGES), spared=st.sets(st.sampled_from(ADAPTERS)))
    def make_free(self, num_pages: int, spared: set[str]) -> None:
        accounts = self.accounts
        before, evictable = accounts.num_free, accounts.num_evictable(spared)
        there = {i for i in spared if accounts.residency.is_resident(i)}
        if accounts.try_make_free(num_pages, spared):
            assert accounts.num_free >= num_pages
        else:
            assert accounts.num_free == before
            assert before + evictable < num_pages, "there was room"
        assert all(accounts.residency.is_resident(i) for i in there), "a spared adapter left"

    @rule(num_pages=st.integers(1, PAGES), spared=st.sets(st.sampled_from(ADAPTERS)))
    def evict(self, num_pages: int, spared: set[str]) -> None:
        evictable, before = self.accounts.num_evictable(spared), self.accounts.num_free
        freed = self.accounts.evict(num_pages, spared)
        assert freed == self.accounts.num_free - before
        assert min(num_pages, evictable) <= freed <= evictable

    @rule(after_s=st.sampled_from((0.1, 10.0, 1000.0)), page_s=st.sampled_from((0.0, 0.01, 5.0)))
    def time_goes_by(self, after_s: float, page_s: float) -> None:
        self.accounts.clock.set(self.accounts.clock.now_s + after_s)
        self.costs.page_s = page_s

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "accounts"):
            return
        accounts, allocator = self.accounts, self.accounts.allocator
        accounts.check()
        private = [p for s in self.lives for p in s.table.pages[s.table.num_shared :]]
        assert len(private) == len(set(private)) == allocator.num_held(PageUse.KV)
        shared = {p for s in self.lives for p in s.table.pages[: s.table.num_shared]}
        assert not shared & set(private), "a private page is shared"
        assert len(shared) + accounts.prefixes.num_idle == allocator.num_held(PageUse.PREFIX)
        adapters = {
            p
            for i in (*accounts.residency.resident_ids(), *accounts.residency.loading_ids())
            for p in accounts.residency.pages(i)
        }
        assert not adapters & (shared | set(private)), "an adapter has a sequence's page"
        pinned = [s.adapter_id for s in self.lives if s.adapter_id]
        assert accounts.residency.num_pins() == len(pinned)
        assert all(accounts.residency.is_resident(i) for i in pinned)

    def teardown(self) -> None:
        """Whatever happened: once everybody is gone, the whole pool can be had."""
        if not hasattr(self, "accounts"):
            return
        for life in self.lives:
            life.table.release()
            if life.adapter_id:
                self.accounts.residency.unpin(life.adapter_id)
        for adapter_id in self.accounts.residency.loading_ids():
            self.accounts.residency.fail_load(adapter_id)
        assert self.accounts.try_make_free(PAGES)
        assert self.accounts.prefixes.pages_by_adapter() == {}
        self.accounts.check()


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
