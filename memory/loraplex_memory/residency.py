"""Which adapters are in the pool, and which of them may leave it.

    absent --begin_load--> LOADING --finish_load--> RESIDENT --evict--> absent
                              |                         ^
                              +--fail_load--> absent    +-- pin / unpin (running sequences)

Invariants: an adapter holds its pages from `begin_load` until `evict` or `fail_load`; a loading
or pinned adapter is never evicted; everything stays resident until the space is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum

from loraplex_memory.allocator import PageAllocator, PageUse


class ResidencyState(StrEnum):
    LOADING = "loading"
    RESIDENT = "resident"


@dataclass
class _Entry:
    pages: tuple[int, ...]
    state: ResidencyState = ResidencyState.LOADING
    pins: int = 0
    is_doomed: bool = False

    @property
    def is_idle(self) -> bool:
        return self.state is ResidencyState.RESIDENT and self.pins == 0


class AdapterResidency:
    """Owned by the engine step (one thread); keys are adapter ids, never names or paths."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        # Least recently used first; `pin` and `finish_load` move an adapter to the end.
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        # Counted, not summed up: thousands are resident, and every step asks.
        self._num_loading = 0
        self._num_idle_pages = 0

    def __len__(self) -> int:
        return len(self._entries)

    def state(self, adapter_id: str) -> ResidencyState | None:
        """Return where the adapter is in its life here; None when it holds no pages."""
        entry = self._entries.get(adapter_id)
        return entry.state if entry else None

    def is_resident(self, adapter_id: str) -> bool:
        return self.state(adapter_id) is ResidencyState.RESIDENT

    def pages(self, adapter_id: str) -> tuple[int, ...]:
        """Return the adapter's page ids; KeyError when it holds none."""
        return self._entries[adapter_id].pages

    def resident_ids(self) -> list[str]:
        """Ids ready to serve, least recently used first."""
        return [i for i, e in self._entries.items() if e.state is ResidencyState.RESIDENT]

    @property
    def num_loading(self) -> int:
        return self._num_loading

    def loading_ids(self) -> list[str]:
        return [i for i, e in self._entries.items() if e.state is ResidencyState.LOADING]

    def num_pins(self) -> int:
        """Running sequences that hold an adapter, over all adapters."""
        return sum(e.pins for e in self._entries.values())

    def begin_load(self, adapter_id: str, num_pages: int) -> tuple[int, ...]:
        """Take pages for an absent adapter and return them.

        Raises:
            OutOfPages: not enough free pages; nothing changed.
        """
        if adapter_id in self._entries:
            raise ValueError(f"adapter {adapter_id} already holds pages")
        pages = tuple(self._allocator.alloc(num_pages, PageUse.ADAPTER))
        self._entries[adapter_id] = _Entry(pages)
        self._num_loading += 1
        return pages

    def finish_load(self, adapter_id: str) -> None:
        """The weights are in the pages: the adapter can serve."""
        entry = self._entries[adapter_id]
        assert entry.state is ResidencyState.LOADING, f"{adapter_id} was not loading"
        entry.state = ResidencyState.RESIDENT
        self._num_loading -= 1
        self._num_idle_pages += len(entry.pages)
        self._entries.move_to_end(adapter_id)
        self._release_if_doomed(adapter_id)

    def fail_load(self, adapter_id: str) -> None:
        """The load failed: the pages go back and the adapter is absent again."""
        entry = self._entries.pop(adapter_id)
        assert entry.state is ResidencyState.LOADING, f"{adapter_id} was not loading"
        self._num_loading -= 1
        self._allocator.free(entry.pages)

    def pin(self, adapter_id: str) -> None:
        """Hold a resident adapter for one running sequence."""
        entry = self._entries[adapter_id]
        assert entry.state is ResidencyState.RESIDENT, f"{adapter_id} is not ready"
        if entry.pins == 0:
            self._num_idle_pages -= len(entry.pages)
        entry.pins += 1
        self._entries.move_to_end(adapter_id)

    def unpin(self, adapter_id: str) -> None:
        entry = self._entries[adapter_id]
        assert entry.pins > 0, f"{adapter_id} is not pinned"
        entry.pins -= 1
        if entry.pins == 0:
            self._num_idle_pages += len(entry.pages)
        self._release_if_doomed(adapter_id)

    def discard(self, adapter_id: str) -> None:
        """Evict as soon as nobody uses it: now when idle, else at the last unpin."""
        entry = self._entries.get(adapter_id)
        if entry is not None:
            entry.is_doomed = True
            self._release_if_doomed(adapter_id)

    def keep(self, adapter_id: str) -> None:
        """Take a `discard` back: the same content is wanted again."""
        entry = self._entries.get(adapter_id)
        if entry is not None:
            entry.is_doomed = False

    def num_evictable_pages(self, keep: AbstractSet[str] = frozenset()) -> int:
        """Pages that `evict_idle` could free while sparing `keep`."""
        kept = ((i, self._entries[i]) for i in keep if i in self._entries)
        return self._num_idle_pages - sum(len(e.pages) for _, e in kept if e.is_idle)

    def evict_idle(self, num_pages: int, keep: AbstractSet[str] = frozenset()) -> list[str]:
        """Evict idle adapters, least recently used first, until `num_pages` pages came free.

        Returns:
            The ids evicted; their pages may add up to less than asked for.
        """
        evicted, freed = [], 0
        for adapter_id, entry in self._entries.items():
            if freed >= num_pages:
                break
            if entry.is_idle and adapter_id not in keep:
                freed += len(entry.pages)
                evicted.append(adapter_id)
        for adapter_id in evicted:
            self._evict(adapter_id)
        return evicted

    def check(self) -> None:
        """Raise AssertionError if the accounts disagree with the allocator's."""
        pages = [page for entry in self._entries.values() for page in entry.pages]
        assert len(pages) == len(set(pages)), "two adapters hold the same page"
        assert len(pages) == self._allocator.num_held(PageUse.ADAPTER), "adapter pages leaked"
        for adapter_id, entry in self._entries.items():
            assert entry.pins == 0 or entry.state is ResidencyState.RESIDENT, adapter_id
        idle = sum(len(entry.pages) for entry in self._entries.values() if entry.is_idle)
        assert idle == self._num_idle_pages, "the count of idle pages is off"
        assert len(self.loading_ids()) == self._num_loading, "the count of loads is off"

    def _evict(self, adapter_id: str) -> None:
        entry = self._entries.pop(adapter_id)
        self._num_idle_pages -= len(entry.pages)
        self._allocator.free(entry.pages)

    def _release_if_doomed(self, adapter_id: str) -> None:
        entry = self._entries[adapter_id]
        if entry.is_doomed and entry.is_idle:
            self._evict(adapter_id)
