"""Runs of consecutive numbers: what lies side by side is moved at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def runs(numbers: Sequence[int]) -> Iterator[slice]:
    """Yield the positions of each longest run of numbers that go up by one."""
    start = 0
    for stop in range(1, len(numbers) + 1):
        if stop == len(numbers) or numbers[stop] != numbers[stop - 1] + 1:
            yield slice(start, stop)
            start = stop
