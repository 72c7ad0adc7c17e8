"""Which adapters are in the pool, and which of them may leave it.

    absent --begin_load--> LOADING --finish_load--> RESIDENT --evict--> absent
                              |                         ^
                              +--fail_load--> absent    +-- pin / unpin (running sequences)

Invariants: an adapter holds its pages from `begin_load` until `evict` or `fail_load`; a loading
or pinned adapter is never evicted; everything stays resident until the space is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from enum import StrEnum

from loraplex_memory.allocator import PageAllocator, PageUse
from loraplex_memory.clock import GivenClock
from loraplex_memory.eviction import EvictionPolicy, RestoreCosts, page_cost
from loraplex_memory.evictor import Evictor
from loraplex_memory.lazy_heap import Evictable
from loraplex_memory.prefix_cache import PrefixCache
from loraplex_memory.usage import UseHistory

#: Adapters whose use is remembered, resident or not.
MAX_REMEMBERED = 65_536


class ResidencyState(StrEnum):
    LOADING = "loading"
    RESIDENT = "resident"


class PooledAdapter(Evictable):
    """An adapter that holds pages."""

    __slots__ = (
        "_history",
        "adapter_id",
        "is_doomed",
        "is_resident",
        "last_use_s",
        "num_pins",
        "page_cost",
        "pages",
    )

    def __init__(self, adapter_id: str, pages: tuple[int, ...], history: UseHistory) -> None:
        super().__init__()
        self.adapter_id = adapter_id
        self.pages = pages
        self.is_resident = False
        self.is_doomed = False
        self.num_pins = 0
        self.last_use_s = 0.0
        self.page_cost = 0.0
        self._history = history

    @property
    def is_evictable(self) -> bool:
        return self.is_resident and not self.num_pins

    @property
    def spared_as(self) -> str | None:
        return self.adapter_id

    def key(self, policy: EvictionPolicy) -> float:
        return policy.adapter_key(
            last_use_s=self.last_use_s,
            use_score=self._history.score(self.adapter_id),
            page_cost=self.page_cost,
        )


class AdapterResidency:
    """Owned by the engine step (one thread); keys are adapter ids, never names or paths."""

    def __init__(
        self,
        allocator: PageAllocator,
        evictor: Evictor,
        prefixes: PrefixCache,
        costs: RestoreCosts,
        clock: GivenClock,
    ) -> None:
        self._allocator = allocator
        self._evictor = evictor
        self._prefixes = prefixes
        self._costs = costs
        self._clock = clock
        self._history = UseHistory(clock, evictor.policy.adapter_half_life_s, MAX_REMEMBERED)
        # Least recently used first; `pin` and `finish_load` move an adapter to the end.
        self._entries: OrderedDict[str, PooledAdapter] = OrderedDict()
        #: Ids that whoever looks for room is to spare as long as it can; resident or not.
        self.kept: frozenset[str] = frozenset()
        self._idle: dict[str, int] = {}  # pages of each adapter that could leave
        # Counted, not summed up: thousands are resident, and every step asks.
        self._num_loading = 0
        self._num_pins = 0
        self._num_idle_pages = 0

    def __len__(self) -> int:
        return len(self._entries)

    def state(self, adapter_id: str) -> ResidencyState | None:
        """Return where the adapter is in its life here; None when it holds no pages."""
        entry = self._entries.get(adapter_id)
        if entry is None:
            return None
        return ResidencyState.RESIDENT if entry.is_resident else ResidencyState.LOADING

    def absent(self, adapter_ids: Iterable[str]) -> list[str]:
        """Return those of the adapters that hold no pages."""
        entries = self._entries
        return [i for i in adapter_ids if i not in entries]

    def is_resident(self, adapter_id: str) -> bool:
        entry = self._entries.get(adapter_id)
        return entry is not None and entry.is_resident

    def pages(self, adapter_id: str) -> tuple[int, ...]:
        """Return the adapter's page ids; KeyError when it holds none."""
        return self._entries[adapter_id].pages

    def resident_ids(self) -> list[str]:
        """Ids ready to serve, least recently used first."""
        return [i for i, e in self._entries.items() if e.is_resident]

    @property
    def num_loading(self) -> int:
        return self._num_loading

    def loading_ids(self) -> list[str]:
        return [i for i, e in self._entries.items() if not e.is_resident]

    def num_pins(self) -> int:
        """Running sequences that hold an adapter, over all adapters."""
        return self._num_pins

    def num_idle_pages(self, spared: AbstractSet[str] = frozenset()) -> int:
        """Pages of adapters that could be evicted, without the spared ones."""
        if not spared:
            return self._num_idle_pages
        return self._num_idle_pages - sum([self._idle[i] for i in self._idle.keys() & spared])

    def expect(self, adapter_id: str) -> None:
        """A request that names the adapter arrived, whether it is in the pool or not.

        An adapter that no request ever named is the first to be evicted by frequency.
        """
        self._history.add(adapter_id)

    def popularity(self, adapter_id: str) -> float:
        """Return the decayed count of requests for the adapter."""
        return self._history.count(adapter_id)

    def begin_load(self, adapter_id: str, num_pages: int) -> tuple[int, ...]:
        """Take pages for an absent adapter and return them.

        Raises:
            OutOfPages: not enough free pages; nothing changed.
        """
        if adapter_id in self._entries:
            raise ValueError(f"adapter {adapter_id} already holds pages")
        pages = tuple(self._allocator.alloc(num_pages, PageUse.ADAPTER))
        self._entries[adapter_id] = PooledAdapter(adapter_id, pages, self._history)
        self._num_loading += 1
        self._prefixes.adapter_came(adapter_id)
        return pages

    def finish_load(self, adapter_id: str) -> None:
        """The weights are in the pages: the adapter can serve."""
        entry = self._entries[adapter_id]
        assert not entry.is_resident, f"{adapter_id} was not loading"
        entry.is_resident = True
        self._num_loading -= 1
        self._entries.move_to_end(adapter_id)
        self._become_idle(entry)

    def fail_load(self, adapter_id: str) -> None:
        """The load failed: the pages go back and the adapter is absent again."""
        entry = self._entries[adapter_id]
        assert not entry.is_resident, f"{adapter_id} was not loading"
        self._num_loading -= 1
        self._remove(entry)

    def pin(self, adapter_id: str) -> None:
        """Hold a resident adapter for one running sequence."""
        entry = self._entries[adapter_id]
        assert entry.is_resident, f"{adapter_id} is not ready"
        if not entry.num_pins:
            self._num_idle_pages -= self._idle.pop(adapter_id)
        entry.num_pins += 1
        self._num_pins += 1
        self._entries.move_to_end(adapter_id)

    def unpin(self, adapter_id: str) -> None:
        entry = self._entries[adapter_id]
        assert entry.num_pins > 0, f"{adapter_id} is not pinned"
        entry.num_pins -= 1
        self._num_pins -= 1
        if not entry.num_pins:
            self._become_idle(entry)

    def discard(self, adapter_id: str) -> None:
        """Evict as soon as nobody uses it: now when idle, else at the last unpin."""
        entry = self._entries.get(adapter_id)
        if entry is None:
            return
        entry.is_doomed = True
        if entry.is_evictable:
            self.evict(entry)

    def keep(self, adapter_id: str) -> None:
        """Take a `discard` back: the same content is wanted again."""
        entry = self._entries.get(adapter_id)
        if entry is not None:
            entry.is_doomed = False

    def evict(self, entry: PooledAdapter) -> None:
        """Free the pages of an idle adapter."""
        assert entry.is_evictable, f"{entry.adapter_id} is in use"
        self._num_idle_pages -= self._idle.pop(entry.adapter_id)
        self._remove(entry)

    def evict_all_idle(self, spared: AbstractSet[str] = frozenset()) -> int:
        """Evict every adapter that nobody runs with; returns how many."""
        idle = [self._entries[i] for i in self._idle if i not in spared]
        for entry in idle:
            self.evict(entry)
        return len(idle)

    def idle_adapters(self) -> Iterator[PooledAdapter]:
        """Yield all that could leave now."""
        for adapter_id in self._idle:
            yield self._entries[adapter_id]

    def check(self) -> None:
        """Raise AssertionError if the accounts disagree with the allocator's."""
        entries = self._entries.values()
        pages = [page for entry in entries for page in entry.pages]
        assert len(pages) == len(set(pages)), "two adapters hold the same page"
        assert len(pages) == self._allocator.num_held(PageUse.ADAPTER), "adapter pages leaked"
        for entry in entries:
            assert entry.num_pins == 0 or entry.is_resident, entry.adapter_id
            assert not (entry.is_doomed and entry.is_evictable), "a doomed adapter stays"
        idle = {e.adapter_id: len(e.pages) for e in entries if e.is_evictable}
        assert idle == self._idle, "an idle adapter is not known as one"
        assert sum(idle.values()) == self._num_idle_pages, "the count of idle pages is off"
        assert sum(e.num_pins for e in entries) == self._num_pins, "the count of pins is off"
        assert len(self.loading_ids()) == self._num_loading, "the count of loads is off"

    def _become_idle(self, entry: PooledAdapter) -> None:
        num_pages = len(entry.pages)
        self._idle[entry.adapter_id] = num_pages
        self._num_idle_pages += num_pages
        if entry.is_doomed:
            self.evict(entry)
            return
        entry.last_use_s = self._clock.now_s
        entry.page_cost = page_cost(self._costs.adapter_s(num_pages), num_pages)
        self._evictor.adapters.offer(entry)

    def _remove(self, entry: PooledAdapter) -> None:
        del self._entries[entry.adapter_id]
        self._evictor.adapters.withdraw(entry)
        self._allocator.free(entry.pages)
        self._prefixes.adapter_left(entry.adapter_id)
