"""How often something was used, with what is long ago counting less.

A use counts one when it happens and half as much after every half-life. Such a decayed count f
needs no upkeep: all counts shrink by the same factor, so `log2(f) + t / half_life` of a thing
stays the same between its uses, and comparing these *scores* compares the counts (the forward
decay of Cormode et al., "Forward Decay", ICDE 2009). A score is one float, in log space, so that it
neither overflows nor has to be rescaled.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from math import exp2, log2

from loraplex_memory.clock import GivenClock

#: How many of the least recently named ids are compared when one of them must be forgotten.
FORGET_AMONG = 8


def add_scores(first: float, second: float) -> float:
    """Return the score of two counts together: log2(2 ** first + 2 ** second)."""
    if first < second:
        first, second = second, first
    return first + log2(1.0 + exp2(second - first))


class UseHistory:
    """How often adapters were asked for; owned by the engine step (one thread).

    Outlives residency: an adapter that comes back is as popular as it was. Bounded: beyond
    `max_ids` the least used of the few that were named longest ago is forgotten.
    """

    def __init__(self, clock: GivenClock, half_life_s: float, max_ids: int) -> None:
        self._clock = clock
        self._half_life_s = half_life_s
        self._max_ids = max_ids
        # Named longest ago first.
        self._scores: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._scores)

    def add(self, adapter_id: str) -> None:
        """Count one use now."""
        now = self._clock.now_s / self._half_life_s
        score = self._scores.get(adapter_id)
        self._scores[adapter_id] = now if score is None else add_scores(score, now)
        self._scores.move_to_end(adapter_id)
        if len(self._scores) > self._max_ids:
            oldest = islice(self._scores, FORGET_AMONG)
            del self._scores[min(oldest, key=self._scores.__getitem__)]

    def score(self, adapter_id: str) -> float:
        """Return the score, minus infinity of what was never used."""
        return self._scores.get(adapter_id, float("-inf"))

    def count(self, adapter_id: str) -> float:
        """Return the decayed count as of now."""
        return exp2(self.score(adapter_id) - self._clock.now_s / self._half_life_s)


class ReturnOdds:
    """How likely a new page is ever asked for again, learned from all that were made before.

    Owned by the prefix cache. A page that was evicted and is asked for again counts as much as one
    that is found: learned from what is found alone, low odds would get new pages evicted before
    anybody can come back for them, and so confirm themselves. Hence the memory of `max_evicted`
    evicted pages, by hash. What is made now may still be asked for, so the estimate is a little low
    while much is new. Both counts are halved once `window` pages were made, to follow the traffic.
    """

    def __init__(self, window: int = 8192, max_evicted: int = 65_536) -> None:
        self._window = window
        self._max_evicted = max_evicted
        # Rule of succession: even odds before anything is known.
        self._num_made = 2.0
        self._num_returned = 1.0
        # Whether it was ever asked for again; evicted longest ago first.
        self._evicted: OrderedDict[int, bool] = OrderedDict()

    @property
    def odds(self) -> float:
        """A probability in (0, 1]."""
        return min(1.0, self._num_returned / self._num_made)

    def made(self, chain: int) -> bool:
        """Count a page that is made; returns whether it had been evicted before."""
        was_hit = self._evicted.pop(chain, None)
        if was_hit is not None:
            if not was_hit:
                self.returned()
            return True
        self._num_made += 1.0
        if self._num_made > self._window:
            self._num_made /= 2.0
            self._num_returned /= 2.0
        return False

    def returned(self) -> None:
        """A page is asked for again for the first time."""
        self._num_returned += 1.0

    def evicted(self, chain: int, *, was_hit: bool) -> None:
        """Remember an evicted page."""
        self._evicted[chain] = was_hit
        if len(self._evicted) > self._max_evicted:
            self._evicted.popitem(last=False)
