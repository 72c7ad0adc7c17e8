"""Counters by name for the busiest names; all the others share one row.

Names come from users, so there may be any number of them, and every label value is a time series
that Prometheus keeps for weeks. At most `k` names have a row of their own, and `other` is the rest.

Whatever happens, an event is counted in exactly one row, and no row ever goes back:

- What a name did before it got a row stays in `other`, what it does afterwards is in its row.
- A name that loses its row is not shown any more, and what it does goes to `other`; its row is
  kept, so if it comes back it goes on from where it was. Only rows that left long ago are
  forgotten, and begin again from zero, which Prometheus takes for a restart.

Membership is sticky, since each change makes a new time series: a name must have had twice the
recent traffic of the one whose row it takes, few change at once, and not more often than once a
minute. The traffic of names without a row is remembered for the busiest of them (as in "Finding
repeated elements", Misra and Gries 1982: what is forgotten had little).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

OTHER: Final = "other"

#: Between two looks at who deserves a row, in seconds; and after how long traffic counts half.
REVIEW_S: Final = 60.0
_HALF_LIFE_S: Final = 600.0
#: By how much a newcomer must have been busier than the one that leaves.
_MARGIN: Final = 2.0
#: Names without a row whose traffic is remembered, and rows that are kept, for each row shown.
_REMEMBERED: Final = 20


class TopNames:
    """Who has a row; used from one thread.

    Args:
        k: most names with a row.
        clock: in seconds.
    """

    def __init__(self, k: int, clock: Callable[[], float]) -> None:
        self._k = k
        self._clock = clock
        self._inside: dict[str, float] = {}
        self._outside: dict[str, float] = {}
        self._reviewed_s = clock()

    def __iter__(self) -> Iterator[str]:
        return iter(self._inside)

    def __contains__(self, name: object) -> bool:
        return name in self._inside

    def label(self, name: str, traffic: float) -> str:
        """Book traffic of a name and return the row to count it in."""
        if name == OTHER:  # somebody's real name: two things must never share a row unnoticed
            return OTHER
        now = self._clock()
        if now - self._reviewed_s >= REVIEW_S:
            self._review(now)
        if name not in self._inside and len(self._inside) < self._k:
            self._inside[name] = self._outside.pop(name, 0.0)
        if name in self._inside:
            self._inside[name] += traffic
            return name
        self._outside[name] = self._outside.get(name, 0.0) + traffic
        if len(self._outside) > 2 * _REMEMBERED * self._k:
            self._forget_quiet()
        return OTHER

    def _review(self, now: float) -> None:
        """Let the past fade, and give rows of quiet names to busy ones."""
        fade = 0.5 ** ((now - self._reviewed_s) / _HALF_LIFE_S)
        self._reviewed_s = now
        self._inside = {name: traffic * fade for name, traffic in self._inside.items()}
        self._outside = {name: traffic * fade for name, traffic in self._outside.items()}
        quiet = sorted(self._inside, key=self._inside.__getitem__)
        busy = sorted(self._outside, key=self._outside.__getitem__, reverse=True)
        num_changes = max(1, self._k // 10)
        for old, new in zip(quiet[:num_changes], busy, strict=False):
            if self._outside[new] <= _MARGIN * self._inside[old]:
                break
            self._outside[old] = self._inside.pop(old)
            self._inside[new] = self._outside.pop(new)

    def _forget_quiet(self) -> None:
        busiest = sorted(self._outside, key=self._outside.__getitem__, reverse=True)
        self._outside = {n: self._outside[n] for n in busiest[: _REMEMBERED * self._k]}


class TopCounts:
    """Several counters for each of the busiest names; used from one thread.

    Args:
        columns: names of the counters.
    """

    def __init__(self, columns: tuple[str, ...], k: int, clock: Callable[[], float]) -> None:
        self._columns = columns
        self._k = k
        self._names = TopNames(k, clock)
        self._rows: dict[str, dict[str, float]] = {OTHER: self._new_row()}

    def add(self, name: str, traffic: float = 0.0, **amounts: float) -> None:
        """Count something of a name; `traffic` is what it weighs among the busiest."""
        label = self._names.label(name, traffic)
        row = self._rows.get(label)
        if row is None:
            self._make_room()
            row = self._rows[label] = self._new_row()
        for column, amount in amounts.items():
            row[column] += amount

    def column(self, column: str) -> Iterator[tuple[tuple[str], float]]:
        """Yield what a counter says of each name with a row, then of all others."""
        for name in (*self._names, OTHER):
            if name in self._rows:
                yield (name,), self._rows[name][column]

    def is_shown(self, name: str) -> bool:
        """Whether the name has a row of its own now."""
        return name in self._names

    def _new_row(self) -> dict[str, float]:
        return dict.fromkeys(self._columns, 0.0)

    def _make_room(self) -> None:
        """Forget the row that was made first of those not shown, if too many are kept."""
        if len(self._rows) <= _REMEMBERED * self._k:
            return
        for name in self._rows:
            if name != OTHER and name not in self._names:
                del self._rows[name]
                return
