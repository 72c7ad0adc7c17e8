"""Who must end by when; asked before every step, so it looks at nobody whose time has not come."""

from __future__ import annotations

import heapq

from loraplex_scheduler.sequence import Sequence


class Deadlines:
    """Owned by the scheduler. Sequences that ended by themselves are dropped when their time comes,
    or when they are most of what is kept.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence that has a deadline."""
        deadline_s = sequence.request.deadline_s
        if deadline_s is not None:
            heapq.heappush(self._heap, (deadline_s, sequence.order, sequence))

    def pop_late(self, now: float) -> list[Sequence]:
        """Return the live sequences whose deadline has passed, and forget them."""
        late = []
        while self._heap and self._heap[0][0] <= now:
            sequence = heapq.heappop(self._heap)[2]
            if sequence.is_live:
                late.append(sequence)
        return late

    def forget_ended(self, num_live: int) -> None:
        """Give ended sequences' memory back once they outnumber the `num_live` live ones."""
        if len(self._heap) > 2 * num_live + 64:
            self._heap = [entry for entry in self._heap if entry[2].is_live]
            heapq.heapify(self._heap)
