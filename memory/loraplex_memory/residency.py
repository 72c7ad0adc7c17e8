"""Which adapters are in the pool, and which of them may leave it.

    absent --begin_load--> LOADING --finish_load--> RESIDENT --evict--> absent
                              |                         ^
                              +--fail_load--> absent    +-- pin / unpin (running sequences)

Invariants: an adapter holds its pages from `begin_load` until `evict` or `fail_load`; a loading
or pinned adapter is never evicted; everything stays resident until the space is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
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
    is_doomed: bool = field(default=False)


class AdapterResidency:
    """Owned by the engine step (one thread); keys are adapter ids, never names or paths."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        # Least recently used first; `pin` and `finish_load` move an adapter to the end.
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

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
        return pages

    def finish_load(self, adapter_id: str) -> None:
        """The weights are in the pages: the adapter can serve."""
        entry = self._entries[adapter_id]
        assert entry.state is ResidencyState.LOADING, f"{adapter_id} was not loading"
        entry.state = ResidencyState.RESIDENT
        self._entries.move_to_end(adapter_id)
        self._release_if_doomed(adapter_id)

    def fail_load(self, adapter_id: str) -> None:
        """The load failed: the pages go back and the adapter is absent again."""
        entry = self._entries.pop(adapter_id)
        assert entry.state is ResidencyState.LOADING, f"{adapter_id} was not loading"
        self._allocator.free(entry.pages)

    def pin(self, adapter_id: str) -> None:
        """Hold a resident adapter for one running sequence."""
        entry = self._entries[adapter_id]
        assert entry.state is ResidencyState.RESIDENT, f"{adapter_id} is not ready"
        entry.pins += 1
        self._entries.move_to_end(adapter_id)

    def unpin(self, adapter_id: str) -> None:
        entry = self._entries[adapter_id]
        assert entry.pins > 0, f"{adapter_id} is not pinned"
        entry.pins -= 1
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

    def num_evictable_pages(self, keep: Collection[str] = ()) -> int:
        """Pages that `evict_idle` could free while sparing `keep`."""
        return sum(len(e.pages) for i, e in self._entries.items() if self._is_idle(i, e, keep))

    def evict_idle(self, num_pages: int, keep: Collection[str] = ()) -> list[str]:
        """Evict idle adapters, least recently used first, until `num_pages` pages came free.

        Returns:
            The ids evicted; their pages may add up to less than asked for.
        """
        evicted, freed = [], 0
        for adapter_id, entry in list(self._entries.items()):
            if freed >= num_pages:
                break
            if self._is_idle(adapter_id, entry, keep):
                freed += len(entry.pages)
                self._evict(adapter_id)
                evicted.append(adapter_id)
        return evicted

    def check(self) -> None:
        """Raise AssertionError if the accounts disagree with the allocator's."""
        pages = [page for entry in self._entries.values() for page in entry.pages]
        assert len(pages) == len(set(pages)), "two adapters hold the same page"
        assert len(pages) == self._allocator.num_held(PageUse.ADAPTER), "adapter pages leaked"
        for adapter_id, entry in self._entries.items():
            assert entry.pins == 0 or entry.state is ResidencyState.RESIDENT, adapter_id

    @staticmethod
    def _is_idle(adapter_id: str, entry: _Entry, keep: Collection[str]) -> bool:
        is_idle = entry.state is ResidencyState.RESIDENT and entry.pins == 0
        return is_idle and adapter_id not in keep

    def _evict(self, adapter_id: str) -> None:
        self._allocator.free(self._entries.pop(adapter_id).pages)

    def _release_if_doomed(self, adapter_id: str) -> None:
        entry = self._entries[adapter_id]
        if entry.is_doomed and self._is_idle(adapter_id, entry, ()):
            self._evict(adapter_id)
