"""The accounts of the pool: hypothesis tries to lose, double or misfile a page."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex_memory.allocator import PageAllocator, PageUse
from loraplex_memory.errors import OutOfPages
from loraplex_memory.page_table import PageTable
from loraplex_memory.residency import AdapterResidency, ResidencyState

PAGES = 20


def test_a_page_freed_twice_is_caught():
    allocator = PageAllocator(2)
    pages = allocator.alloc(1, PageUse.KV)
    allocator.free(pages)
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free(pages)


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
    allocator = PageAllocator(9)
    residency = AdapterResidency(allocator)
    for name in "abc":
        residency.begin_load(name, 3)
        residency.finish_load(name)
    residency.pin("a")
    residency.unpin("a")
    residency.pin("b")
    assert residency.num_evictable_pages() == 6
    assert residency.evict_idle(1, keep={"c"}) == ["a"]
    assert residency.evict_idle(9) == ["c"]
    assert residency.resident_ids() == ["b"]


def test_a_discarded_adapter_leaves_at_its_last_unpin():
    residency = AdapterResidency(PageAllocator(3))
    residency.begin_load("a", 2)
    residency.discard("a")
    assert residency.state("a") is ResidencyState.LOADING
    residency.keep("a")
    residency.finish_load("a")
    residency.pin("a")
    residency.discard("a")
    assert residency.is_resident("a")
    residency.unpin("a")
    assert residency.state("a") is None


class Accounts(RuleBasedStateMachine):
    """Sequences and adapters come and go in one pool of twenty pages."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(PAGES)
        self.residency = AdapterResidency(self.allocator)
        self.tables: list[PageTable] = []
        self.pins: list[str] = []
        self.next_id = 0

    @rule(num_tokens=st.integers(1, 30))
    def start_sequence(self, num_tokens: int) -> None:
        table = PageTable(self.allocator, 4)
        try:
            table.grow(num_tokens)
        except OutOfPages:
            assert not table.pages
        else:
            self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), more=st.integers(1, 9))
    def grow_sequence(self, data: st.DataObject, more: int) -> None:
        table = data.draw(st.sampled_from(self.tables))
        before = list(table.pages)
        try:
            table.grow(table.capacity + more)
        except OutOfPages:
            assert list(table.pages) == before

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end_sequence(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.tables.remove(table)
        table.release()

    @rule(num_pages=st.integers(0, 8))
    def begin_load(self, num_pages: int) -> None:
        self.next_id += 1
        before = self.allocator.num_free
        try:
            self.residency.begin_load(f"a{self.next_id}", num_pages)
        except OutOfPages:
            assert self.allocator.num_free == before

    @precondition(lambda self: self.residency.loading_ids())
    @rule(data=st.data(), succeeds=st.booleans())
    def end_load(self, data: st.DataObject, succeeds: bool) -> None:
        adapter_id = data.draw(st.sampled_from(self.residency.loading_ids()))
        (self.residency.finish_load if succeeds else self.residency.fail_load)(adapter_id)

    @precondition(lambda self: self.residency.resident_ids())
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        adapter_id = data.draw(st.sampled_from(self.residency.resident_ids()))
        self.residency.pin(adapter_id)
        self.pins.append(adapter_id)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        adapter_id = data.draw(st.sampled_from(self.pins))
        self.pins.remove(adapter_id)
        self.residency.unpin(adapter_id)

    @rule(num_pages=st.integers(1, PAGES))
    def evict(self, num_pages: int) -> None:
        offered = self.residency.num_evictable_pages()
        before = self.allocator.num_free
        evicted = self.residency.evict_idle(num_pages)
        assert not set(evicted) & set(self.pins)
        assert self.allocator.num_free - before >= min(num_pages, offered)

    @precondition(lambda self: len(self.residency))
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        ids = self.residency.resident_ids() + self.residency.loading_ids()
        self.residency.discard(data.draw(st.sampled_from(ids)))

    @invariant()
    def accounts_agree(self) -> None:
        self.allocator.check()
        self.residency.check()
        kv = sum(len(table.pages) for table in self.tables)
        assert kv == self.allocator.num_held(PageUse.KV)
        assert all(self.residency.is_resident(i) for i in self.pins)


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
