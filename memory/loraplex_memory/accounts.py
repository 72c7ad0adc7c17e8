"""The accounts of one pool, bundled: who holds which page, and who leaves when pages are short."""

from __future__ import annotations

import sys
from collections.abc import Set as AbstractSet
from enum import StrEnum

from loraplex_memory.allocator import PageAllocator
from loraplex_memory.clock import GivenClock
from loraplex_memory.eviction import EvictionPolicy, RestoreCosts
from loraplex_memory.evictor import Evictor
from loraplex_memory.layout import PoolLayout
from loraplex_memory.page_table import PageTable
from loraplex_memory.prefix_cache import PrefixCache
from loraplex_memory.prefix_node import PrefixNode
from loraplex_memory.residency import AdapterResidency, PooledAdapter


class EvictionCause(StrEnum):
    """Why an adapter left the pool: a sequence or another adapter needed its pages, or nobody it.

    `UNUSED` is the policy of that name: whoever has no user leaves.
    """

    KV = "kv"
    ADAPTER = "adapter"
    UNUSED = "unused"


class PoolAccounts:
    """Owned by the engine step (one thread), or by a simulator; touches no tensor.

    Attributes:
        clock: set by the scheduler before it calls anything else here.
        evictions: adapters evicted so far, by cause.
        num_prefix_evictions: prefix pages evicted so far.
    """

    def __init__(
        self,
        layout: PoolLayout,
        num_pages: int,
        *,
        eviction: EvictionPolicy,
        costs: RestoreCosts,
        has_prefix_cache: bool = True,
    ) -> None:
        self.layout = layout
        self.clock = GivenClock()
        self.allocator = PageAllocator(num_pages)
        self._evictor = Evictor(eviction, self.clock)
        self.prefixes = PrefixCache(
            self.allocator,
            self._evictor,
            costs,
            self.clock,
            layout.page_tokens,
            is_enabled=has_prefix_cache,
        )
        self.residency = AdapterResidency(
            self.allocator, self._evictor, self.prefixes, costs, self.clock
        )
        self.evictions = dict.fromkeys(EvictionCause, 0)
        self.num_prefix_evictions = 0

    @property
    def drops_unused(self) -> bool:
        """Adapters leave as soon as nobody runs with them, so having one early is of no use."""
        return self._evictor.policy.drops_unused

    @property
    def num_adapter_evictions(self) -> int:
        """Adapters evicted so far."""
        return sum(self.evictions.values())

    @property
    def num_free(self) -> int:
        return self.allocator.num_free

    def num_evictable(self, spared: AbstractSet[str] = frozenset()) -> int:
        """Pages of idle adapters, except the spared ones, and of idle prefixes."""
        return self.residency.num_idle_pages(spared) + self.prefixes.num_idle

    def num_obtainable(self, spared: AbstractSet[str] = frozenset()) -> int:
        """Pages that are free, or would be if everything idle but the spared adapters left."""
        return self.allocator.num_free + self.num_evictable(spared)

    def new_table(
        self, adapter_id: str | None, max_shared: int = sys.maxsize, salt: str = ""
    ) -> PageTable:
        """Return an empty table for a sequence of this adapter, None: of the base model.

        Args:
            max_shared: tokens from there on are shared with nobody.
            salt: those before are shared with tables of the same salt.
        """
        page_tokens = self.layout.page_tokens
        return PageTable(self.allocator, page_tokens, self.prefixes, adapter_id, max_shared, salt)

    def try_make_free(
        self,
        num_pages: int,
        spared: AbstractSet[str] = frozenset(),
        cause: EvictionCause = EvictionCause.KV,
    ) -> bool:
        """Evict until `num_pages` are free, or change nothing and return False."""
        missing = num_pages - self.allocator.num_free
        if missing <= 0:
            return True
        if not self._has_evictable(missing, spared):
            return False
        freed = self.evict(missing, spared, cause)
        assert freed >= missing, "what counts as evictable was not evicted"
        return True

    def evict(
        self,
        num_pages: int,
        spared: AbstractSet[str] = frozenset(),
        cause: EvictionCause = EvictionCause.KV,
    ) -> int:
        """Evict until `num_pages` more are free or nothing is left; returns pages that came free.

        Adapters leave whole, so more may come free than was asked for; those to be kept leave last.
        """
        kept = self.residency.kept
        if not kept:
            return self._evict(num_pages, spared, cause)
        freed = self._evict(num_pages, spared | kept, cause)
        return freed + self._evict(num_pages - freed, spared, cause)

    def _evict(self, num_pages: int, spared: AbstractSet[str], cause: EvictionCause) -> int:
        if num_pages <= 0:
            return 0
        before = self.allocator.num_free
        for item, bound in self._evictor.in_order(spared):
            if isinstance(item, PooledAdapter):
                self.residency.evict(item)
                self.evictions[cause] += 1
            else:
                assert isinstance(item, PrefixNode), "nothing else can leave"
                num_left = num_pages - (self.allocator.num_free - before)
                self.num_prefix_evictions += self.prefixes.evict(item, bound, num_left)
            if self.allocator.num_free - before >= num_pages:
                break
        return self.allocator.num_free - before

    def drop_unused(self, spared: AbstractSet[str] = frozenset()) -> None:
        """A sequence ended: evict every idle adapter now, if the policy drops what is unused."""
        if self._evictor.policy.drops_unused:
            self.evictions[EvictionCause.UNUSED] += self.residency.evict_all_idle(spared)

    def discard_adapter(self, adapter_id: str) -> None:
        """The adapter is gone for good: free its pages and prefixes, in use ones when released."""
        self.residency.discard(adapter_id)
        self.prefixes.drop_adapter(adapter_id)

    def check(self) -> None:
        """Raise AssertionError if a page is lost or an idle thing cannot be evicted; O(pages)."""
        self.allocator.check()
        self.residency.check()
        self.prefixes.check()
        self._evictor.check(self.residency.idle_adapters(), self.prefixes.idle_leaves())

    def _has_evictable(self, num_pages: int, spared: AbstractSet[str]) -> bool:
        """Compare `num_evictable` with a number, counting the spared only where they decide."""
        missing = num_pages - self.prefixes.num_idle
        if missing <= 0:
            return True
        if self.residency.num_idle_pages() < missing:
            return False
        return self.residency.num_idle_pages(spared) >= missing
