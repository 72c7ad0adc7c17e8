"""One lazy heap over all that may leave the pool, the least valuable first.

Each thing has at most one live entry, with a key that is at most its key of now. Keys rise by use
and the entry is left alone: when it comes to the top it is put back with the key of now. Only when
a key falls a new entry is made at once. So using things costs no heap operation, and evicting one
O(log n), each entry put back being paid for by a use since.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set as AbstractSet
from heapq import heapify, heappop, heappush

from loraplex_memory.eviction import EvictionPolicy

#: Dead entries that are not worth a clean-up.
MIN_GARBAGE = 64


class Evictable(ABC):
    """What may leave the pool while it is idle.

    Attributes:
        entry: number of its live heap entry; 0 without one.
        entry_key: the key of that entry.
    """

    __slots__ = ("entry", "entry_key")

    def __init__(self) -> None:
        self.entry = 0
        self.entry_key = 0.0

    @property
    @abstractmethod
    def is_evictable(self) -> bool:
        """It may leave now."""

    @property
    @abstractmethod
    def spared_as(self) -> str | None:
        """The name by which it may be spared; None: it never is."""

    @abstractmethod
    def key(self, policy: EvictionPolicy) -> float:
        """Return its key as of its last use."""


class Evictor:
    """Owned by the engine step (one thread); told of whatever becomes idle, gives out the least.

    Always true: an evictable thing has a live entry in the heap, or is set aside.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self._heap: list[tuple[float, int, Evictable]] = []
        self._last_entry = 0
        self._num_dead = 0
        # Spared when they came to the top. They are kept out of the heap for as long as they are
        # spared, or every eviction under a long queue would pass by all of them again.
        self._set_aside: dict[str, Evictable] = {}

    def __len__(self) -> int:
        """Entries of the heap, dead ones included."""
        return len(self._heap)

    def offer(self, item: Evictable) -> None:
        """It became evictable, or its key may have fallen."""
        key = item.key(self.policy)
        if item.entry:
            if key >= item.entry_key:
                return
            if item.spared_as in self._set_aside:
                item.entry_key = key
                return
            self._num_dead += 1
        self._push(item, key)
        self._clean_up()

    def withdraw(self, item: Evictable) -> None:
        """It left the pool."""
        if not item.entry:
            return
        item.entry = 0
        if item.spared_as is None or self._set_aside.pop(item.spared_as, None) is None:
            self._num_dead += 1
            self._clean_up()

    def pop(self, spared: AbstractSet[str]) -> Evictable | None:
        """Take out the evictable thing of the least key that is not spared; None: there is none."""
        if self._set_aside:
            for no_longer in [name for name in self._set_aside if name not in spared]:
                item = self._set_aside.pop(no_longer)
                self._push(item, item.entry_key)
        heap = self._heap
        while heap:
            entry_key, entry, item = heappop(heap)
            if item.entry != entry:
                self._num_dead -= 1
            elif not item.is_evictable:
                item.entry = 0
            elif (key := item.key(self.policy)) > entry_key:
                self._push(item, key)
            elif (name := item.spared_as) is not None and name in spared:
                self._set_aside[name] = item
            else:
                item.entry = 0
                self._clean_up()
                return item
        return None

    def check(self, evictable: list[Evictable]) -> None:
        """Raise AssertionError unless exactly these can be found, none above its key of now."""
        live = {id(item): key for key, entry, item in self._heap if item.entry == entry}
        dead = len(self._heap) - len(live)
        assert dead == self._num_dead, "the count of dead entries is off"
        assert dead <= max(MIN_GARBAGE, len(self._heap) // 2), "dead entries pile up"
        for item in evictable:
            assert item.is_evictable, "an idle thing cannot leave"
            assert item.entry, "an idle thing has no entry"
            assert item.entry_key <= item.key(self.policy), "an entry above its key"
            is_aside = item.spared_as in self._set_aside
            assert is_aside != (id(item) in live), "an idle thing is lost, or in two places"
            assert is_aside or live[id(item)] == item.entry_key, "an entry of another key"
        assert all(item.entry for item in self._set_aside.values()), "set aside without an entry"

    def _push(self, item: Evictable, key: float) -> None:
        self._last_entry += 1
        item.entry = self._last_entry
        item.entry_key = key
        heappush(self._heap, (key, self._last_entry, item))

    def _clean_up(self) -> None:
        if self._num_dead > MIN_GARBAGE and self._num_dead > len(self._heap) // 2:
            self._heap = [e for e in self._heap if e[2].entry == e[1]]
            heapify(self._heap)
            self._num_dead = 0
