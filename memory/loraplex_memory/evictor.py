"""The one evictor: idle adapters and idle prefix pages compete for the same space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from math import inf
from typing import Final

from loraplex_memory.clock import GivenClock
from loraplex_memory.eviction import EvictionPolicy
from loraplex_memory.lazy_heap import Evictable, LazyHeap

#: Prefix pages have no names to be spared by.
_NOBODY: Final[frozenset[str]] = frozenset()


class Evictor:
    """Owned by the engine step (one thread); told of whatever becomes idle, gives out the least.

    All adapters fade at one pace and all prefix pages at another, so the order within each kind
    never changes by the passing of time: a heap for each. Between the two, the values of now
    decide: `key - now / half_life`.
    """

    def __init__(self, policy: EvictionPolicy, clock: GivenClock) -> None:
        self.policy = policy
        self._clock = clock
        self.adapters = LazyHeap(policy)
        self.prefixes = LazyHeap(policy)

    def in_order(self, spared: AbstractSet[str]) -> Iterator[tuple[Evictable, float]]:
        """Take out and yield what is worth least and not spared, until there is nothing left.

        With each comes a bound: prefix pages with smaller keys are worth less than all the rest, so
        those that the leaving of this one makes evictable may leave with it. All that was yielded
        must have left before the next is asked for, and nothing else may change meanwhile.
        """
        adapter, prefix = self.adapters.top(spared), self.prefixes.top(_NOBODY)
        while True:
            if adapter is not None and (prefix is None or self._is_less(adapter, prefix)):
                self.adapters.take()
                yield adapter, -inf
                adapter = self.adapters.top(spared)
            elif prefix is not None:
                self.prefixes.take()
                bound = inf if adapter is None else self._as_prefix_key(adapter)
                yield prefix, min(bound, self.prefixes.least_key())
            else:
                return
            prefix = self.prefixes.top(_NOBODY)

    def check(self, adapters: Iterable[Evictable], prefixes: Iterable[Evictable]) -> None:
        """Raise AssertionError unless exactly these can be evicted."""
        self.adapters.check(adapters)
        self.prefixes.check(prefixes)

    def _is_less(self, adapter: Evictable, prefix: Evictable) -> bool:
        now_s, policy = self._clock.now_s, self.policy
        adapter_value = adapter.entry_key - now_s / policy.adapter_half_life_s
        return adapter_value < prefix.entry_key - now_s / policy.prefix_half_life_s

    def _as_prefix_key(self, adapter: Evictable) -> float:
        """Return the key of a prefix page that is now worth as much as the adapter."""
        now_s, policy = self._clock.now_s, self.policy
        adapter_value = adapter.entry_key - now_s / policy.adapter_half_life_s
        return adapter_value + now_s / policy.prefix_half_life_s
