"""When a place will be free, for clients that were refused because all are taken.

By Little's law, places of a full house come free at the rate of their number over the time that
sequences stay, as they did lately. Whoever is refused is told the time at which the next place
comes that nobody was told of yet: so a crowd does not come back all at once, to find one place.
Nothing is reserved; who comes first has it.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from typing import Final

#: So many tell how long sequences stay.
_NUM_STAYS: Final = 256
#: What to say before any has ended.
_USUAL_S: Final = 1.0
_SHORTEST_S: Final = 0.1
#: OpenAI's clients take no longer time for an answer.
_LONGEST_S: Final = 60.0


class PlaceForecast:
    """Of one server; used from the event loop."""

    def __init__(self, num_places: int, clock: Callable[[], float]) -> None:
        self._num_places = num_places
        self._clock = clock
        self._stays_s: deque[float] = deque(maxlen=_NUM_STAYS)
        self._told_until = 0.0

    def leave(self, num: int, stayed_s: float) -> None:
        """So many sequences ended, which came together."""
        self._stays_s.extend([stayed_s] * num)

    def retry_after_s(self, num: int) -> float:
        """Return when somebody who needs `num` places should come back, in seconds from now."""
        if not self._stays_s:
            return _USUAL_S
        now, stay_s = self._clock(), statistics.fmean(self._stays_s)
        # Most do not come back, or not as told: so never later than all places have changed hands.
        start = min(max(now, self._told_until), now + stay_s)
        self._told_until = start + num * stay_s / self._num_places
        return min(max(self._told_until - now, _SHORTEST_S), _LONGEST_S)
