"""The time as it was last told: the accounts read no clock, so a simulator can drive them."""

from __future__ import annotations


class GivenClock:
    """Owned by the scheduler, which is told the time with each step; everyone else reads `now_s`.

    Seconds on any clock that never goes back: the engine's is monotonic, the simulator's its own.
    """

    def __init__(self) -> None:
        self.now_s = 0.0

    def set(self, now_s: float) -> None:
        """Go forward; an earlier time than the last one is taken for no time having passed."""
        self.now_s = max(self.now_s, now_s)
