"""Which adapters are packed in host memory, and in which pages of it. Accounts only, no tensors.

A page of the host arena has the bytes of one pool page over all layers, so host memory does not
fragment either. An adapter stays until its pages are wanted; then whoever has the smallest value
leaves first, where

    value = decayed uses / pages,    a use `d` seconds ago counting `2 ** (-d / half_life_s)`.

What a page costs to restore from disk is about the same for all of them, so it drops out. Scores
(see `usage`) stay the same between uses, so the heap holds one live entry per adapter, and stale
ones that are skipped when they surface.

Invariants: every page is free or held by exactly one adapter; a pinned adapter keeps its pages.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from loraplex_memory.usage import add_scores

#: Long against a load, short against a working day: a morning's favourite is gone by noon.
DEFAULT_HALF_LIFE_S: Final = 600.0

#: Stale heap entries are swept out when there are more of them than adapters and this many.
_STALE_SLACK: Final = 64


@dataclass
class _Entry:
    pages: tuple[int, ...]
    uses: float
    """A score, see `usage`."""
    stamp: int
    """That of its live heap entry."""
    pins: int = 0
    is_doomed: bool = False

    @property
    def key(self) -> float:
        return self.uses - math.log2(max(1, len(self.pages)))


class HostTier:
    """Owned by the adapter loader, or by the simulator; not safe for threads by itself.

    Times are seconds on any one clock that does not go back.
    """

    def __init__(self, num_pages: int, *, half_life_s: float = DEFAULT_HALF_LIFE_S) -> None:
        self.num_pages = num_pages
        self._half_life_s = half_life_s
        # A heap, and so in order at first: low pages first keeps an adapter's pages together.
        self._free = list(range(num_pages))
        self._entries: dict[str, _Entry] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._num_stamps = 0
        self._num_pinned_pages = 0
        self.num_hits = 0
        self.num_misses = 0
        self.num_evictions = 0

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_used_pages(self) -> int:
        return self.num_pages - len(self._free)

    def lookup(self, adapter_id: str, now_s: float) -> tuple[int, ...] | None:
        """Return the adapter's pages and count a use; None when it is not here."""
        entry = self._entries.get(adapter_id)
        if entry is None or entry.is_doomed:
            self.num_misses += 1
            return None
        self.num_hits += 1
        entry.uses = add_scores(entry.uses, now_s / self._half_life_s)
        self._push(adapter_id, entry)
        return entry.pages

    def reserve(self, adapter_id: str, num_pages: int, now_s: float) -> tuple[int, ...] | None:
        """Give pages to an adapter that is not here, as its first use; evict others for them.

        Returns:
            None, with nothing changed, when it cannot fit: it is larger than the arena, or than
            what pinned adapters leave of it.
        """
        assert adapter_id not in self._entries, f"{adapter_id} is here already"
        if num_pages > self.num_pages - self._num_pinned_pages:
            return None
        while len(self._free) < num_pages:
            self._evict()
        pages = tuple(heapq.heappop(self._free) for _ in range(num_pages))
        entry = _Entry(pages, uses=now_s / self._half_life_s, stamp=0)
        self._entries[adapter_id] = entry
        self._push(adapter_id, entry)
        return pages

    def num_pages_of(self, adapter_id: str) -> int:
        """Return the pages that an adapter takes; 0 when it is not here."""
        entry = self._entries.get(adapter_id)
        return len(entry.pages) if entry else 0

    def pin(self, adapter_id: str) -> None:
        """Keep the adapter while its pages are filled or copied."""
        entry = self._entries[adapter_id]
        if entry.pins == 0:
            self._num_pinned_pages += len(entry.pages)
        entry.pins += 1

    def unpin(self, adapter_id: str) -> None:
        entry = self._entries[adapter_id]
        assert entry.pins > 0, f"{adapter_id} is not pinned"
        entry.pins -= 1
        if entry.pins > 0:
            return
        self._num_pinned_pages -= len(entry.pages)
        if entry.is_doomed:
            self._free_entry(adapter_id)
        elif entry.stamp == 0:
            self._push(adapter_id, entry)

    def drop(self, adapter_id: str) -> None:
        """Give the adapter's pages back: now, or when it is unpinned; nothing if it is not here."""
        entry = self._entries.get(adapter_id)
        if entry is None:
            return
        if entry.pins > 0:
            entry.is_doomed = True
        else:
            self._free_entry(adapter_id)

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        held = [page for entry in self._entries.values() for page in entry.pages]
        assert sorted(held + self._free) == list(range(self.num_pages)), "pages lost or shared"
        pinned = sum(len(entry.pages) for entry in self._entries.values() if entry.pins > 0)
        assert self._num_pinned_pages == pinned
        live = {
            adapter_id for _, stamp, adapter_id in self._heap if self._is_live(stamp, adapter_id)
        }
        idle = {i for i, entry in self._entries.items() if entry.pins == 0}
        assert idle <= live, "an idle adapter that could never be evicted"
        assert not any(e.is_doomed and e.pins == 0 for e in self._entries.values())

    def _push(self, adapter_id: str, entry: _Entry) -> None:
        self._num_stamps += 1
        entry.stamp = self._num_stamps
        heapq.heappush(self._heap, (entry.key, entry.stamp, adapter_id))
        if len(self._heap) > 2 * len(self._entries) + _STALE_SLACK:
            self._heap = [item for item in self._heap if self._is_live(item[1], item[2])]
            heapq.heapify(self._heap)

    def _is_live(self, stamp: int, adapter_id: str) -> bool:
        entry = self._entries.get(adapter_id)
        return entry is not None and entry.stamp == stamp

    def _evict(self) -> None:
        """Evict the least valuable adapter that is not pinned; there is one."""
        while True:
            _, stamp, adapter_id = heapq.heappop(self._heap)
            if not self._is_live(stamp, adapter_id):
                continue
            entry = self._entries[adapter_id]
            if entry.pins == 0:
                break
            entry.stamp = 0  # comes back into the heap when it is unpinned
        self._free_entry(adapter_id)
        self.num_evictions += 1

    def _free_entry(self, adapter_id: str) -> None:
        for page in self._entries.pop(adapter_id).pages:
            heapq.heappush(self._free, page)
