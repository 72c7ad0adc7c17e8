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


class FirstUseOdds:
    """How likely something new is ever used again, learned from all that was made before it.

    Counts what was made and what of it was used at least once; what is made now may still be used,
    so the estimate is a little low while much is new. Both counts are halved every `window` things
    made, to follow the traffic.
    """

    __slots__ = ("_num_made", "_num_used", "_window")

    def __init__(self, window: int = 8192) -> None:
        self._window = window
        # Rule of succession: even odds before anything is known.
        self._num_made = 2.0
        self._num_used = 1.0

    @property
    def odds(self) -> float:
        """A probability in (0, 1]."""
        return min(1.0, self._num_used / self._num_made)

    def made(self) -> None:
        self._num_made += 1.0
        if self._num_made > self._window:
            self._num_made /= 2.0
            self._num_used /= 2.0

    def first_used(self) -> None:
        self._num_used += 1.0
