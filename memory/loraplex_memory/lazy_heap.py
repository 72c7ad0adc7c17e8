"""A heap that is not told when the keys of its things rise.

Each thing has at most one live entry, with a key that is at most its key of now. Keys rise by use
and the entry is left alone: when it comes to the top it is put back with the key of now. Only when
a key falls a new entry is made at once. So using things costs no heap operation, and taking one out
O(log n), each entry put back being paid for by a use since.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from heapq import heapify, heappop, heappush, heappushpop
from math import inf

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


class LazyHeap:
    """Owned by an evictor. Always true: what was offered and may leave is in it, or set aside."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._entries: list[tuple[float, int, Evictable]] = []
        # One entry is kept out of the heap, if there is any: the one offered last or found least.
        # The page before one that left is mostly the next to leave, and then never enters the heap.
        self._at_hand: tuple[float, int, Evictable] | None = None
        self._last_entry = 0
        self._num_dead = 0
        # Spared when they came to the top. They are kept out for as long as they are spared, or
        # every eviction under a long queue would pass by all of them again.
        self._set_aside: dict[str, Evictable] = {}

    def __len__(self) -> int:
        """Entries, dead ones included."""
        return len(self._entries) + (self._at_hand is not None)

    def offer(self, item: Evictable) -> None:
        """It became evictable, or its key may have fallen."""
        key = item.key(self._policy)
        if item.entry:
            if key >= item.entry_key:
                return
            if item.spared_as in self._set_aside:
                item.entry_key = key
                return
            self._num_dead += 1
        self._enter(item, key)
        self._clean_up()

    def withdraw(self, item: Evictable) -> None:
        """It left the pool."""
        if not item.entry:
            return
        item.entry = 0
        if item.spared_as is None or self._set_aside.pop(item.spared_as, None) is None:
            self._num_dead += 1
            self._clean_up()

    def top(self, spared: AbstractSet[str]) -> Evictable | None:
        """Return the evictable thing of the least key that is not spared.

        Its `entry_key` is its key of now, and the next `take` takes it.
        """
        if self._set_aside:
            for no_longer in [name for name in self._set_aside if name not in spared]:
                item = self._set_aside.pop(no_longer)
                self._enter(item, item.entry_key)
        while (least := self._pop_least()) is not None:
            entry_key, entry, item = least
            if item.entry != entry:
                self._num_dead -= 1
            elif not item.is_evictable:
                item.entry = 0
            elif (name := item.spared_as) is not None and name in spared:
                self._set_aside[name] = item
            elif (key := item.key(self._policy)) > entry_key:
                self._at_hand = self._new_entry(item, key)
            else:
                self._at_hand = least
                return item
        return None

    def least_key(self) -> float:
        """Return a key that none here is under, but for the one that `top` returned."""
        return self._entries[0][0] if self._entries else inf

    def take(self) -> None:
        """Take out what `top` has just returned."""
        assert self._at_hand is not None, "nothing was returned"
        self._at_hand[2].entry = 0
        self._at_hand = None
        self._clean_up()

    def check(self, evictable: Iterable[Evictable]) -> None:
        """Raise AssertionError unless exactly these can be found, none above its key of now."""
        entries = [*self._entries, self._at_hand] if self._at_hand else self._entries
        live = {id(item): key for key, entry, item in entries if item.entry == entry}
        dead = len(entries) - len(live)
        assert dead == self._num_dead, "the count of dead entries is off"
        assert dead <= max(MIN_GARBAGE, len(entries) // 2), "dead entries pile up"
        expected = set()
        for item in evictable:
            expected.add(id(item))
            assert item.is_evictable, "an idle thing cannot leave"
            assert item.entry, "an idle thing has no entry"
            assert item.entry_key <= item.key(self._policy), "an entry above its key"
            is_aside = item.spared_as in self._set_aside
            assert is_aside != (id(item) in live), "an idle thing is lost, or in two places"
            assert is_aside or live[id(item)] == item.entry_key, "an entry of another key"
        for _, entry, item in entries:
            unknown = item.entry == entry and item.is_evictable and id(item) not in expected
            assert not unknown, "something else can be evicted"
        assert all(item.entry for item in self._set_aside.values()), "set aside without an entry"

    def _enter(self, item: Evictable, key: float) -> None:
        entry = self._new_entry(item, key)
        if self._at_hand is None:
            self._at_hand = entry
        else:
            heappush(self._entries, entry)

    def _pop_least(self) -> tuple[float, int, Evictable] | None:
        """Take out the least entry, dead or not."""
        entry, self._at_hand = self._at_hand, None
        if entry is not None:
            return heappushpop(self._entries, entry)
        return heappop(self._entries) if self._entries else None

    def _new_entry(self, item: Evictable, key: float) -> tuple[float, int, Evictable]:
        self._last_entry += 1
        item.entry = self._last_entry
        item.entry_key = key
        return key, self._last_entry, item

    def _clean_up(self) -> None:
        if self._num_dead > MIN_GARBAGE and self._num_dead > len(self) // 2:
            if self._at_hand is not None:
                self._entries.append(self._at_hand)
                self._at_hand = None
            self._entries = [e for e in self._entries if e[2].entry == e[1]]
            heapify(self._entries)
            self._num_dead = 0
