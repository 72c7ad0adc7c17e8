"""When a place will be free, for clients that were refused because all are taken.

Places come free as fast as sequences ended lately. Whoever is refused is told the time at which the
next place comes that nobody was told of yet: so a crowd does not come back all at once, to find one
place. Nothing is reserved; who comes first has it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

#: So many ends tell the speed.
_NUM_ENDS: Final = 256
#: What to say before any was seen.
_USUAL_S: Final = 1.0
_SHORTEST_S: Final = 0.1
#: OpenAI's clients take no longer time for an answer.
_LONGEST_S: Final = 60.0


class PlaceForecast:
    """Of one server; used from the event loop."""

    def __init__(self, num_places: int, clock: Callable[[], float]) -> None:
        self._num_places = num_places
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_NUM_ENDS)
        self._told_until = 0.0

    def leave(self, num: int) -> None:
        """So many sequences ended."""
        self._ends.extend([self._clock()] * num)

    def retry_after_s(self, num: int) -> float:
        """Return when somebody who needs `num` places should come back, in seconds from now."""
        now = self._clock()
        place_s = self._place_s(now)
        # Most do not come back, or not as told: so never later than all places have changed hands.
        start = min(max(now, self._told_until), now + self._num_places * place_s)
        self._told_until = start + num * place_s
        return min(max(self._told_until - now, _SHORTEST_S), _LONGEST_S)

    def _place_s(self, now: float) -> float:
        """Return the seconds between two places that come free."""
        if len(self._ends) < 2:
            return _USUAL_S
        return (now - self._ends[0]) / (len(self._ends) - 1)
