"""Python's collector of cyclic garbage, kept out of the steps.

Steps leave no cycles: what they drop is freed at once, by its reference count. But a pool that
fills up makes thousands of small objects that stay, and the collector, left to itself, looks at all
new ones every so often, which takes several times as long as deciding a step. And a full collection
would walk through all that start-up left, hundreds of thousands of objects of torch and its like.
"""

from __future__ import annotations

import gc
from typing import Final

#: Seconds from one collection to the next: of an engine with nothing to do, and of a busy one.
_IDLE_EVERY_S: Final = 60.0
_BUSY_EVERY_S: Final = 600.0


class CycleCollector:
    """Owned by the thread that steps the engine; one per process, as the collector is.

    What start-up left is taken to stay for good; a collection looks at all that came since.
    """

    def __init__(self, now_s: float) -> None:
        """Take over, once everything is set up; `now_s` is on any clock that never goes back."""
        gc.disable()
        self._collect(now_s)
        gc.freeze()

    def collect_if_due(self, now_s: float, *, is_idle: bool) -> None:
        """Collect between two steps; `is_idle`: nobody waits for the next one."""
        every_s = _IDLE_EVERY_S if is_idle else _BUSY_EVERY_S
        if now_s - self._last_s >= every_s:
            self._collect(now_s)

    def release(self) -> None:
        """Give what start-up left back, as the process ends.

        Python's own last collection leaves what is frozen, and libraries then write about leaks.
        """
        gc.unfreeze()

    def _collect(self, now_s: float) -> None:
        gc.collect()
        self._last_s = now_s
