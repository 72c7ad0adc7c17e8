"""The most pages that sequences will hold at once, if each grows by one token per step and ends.

S-LoRA's check before it admits a request (its `ReqQueue._can_add_new_req`), in pages: of sequences
sorted by the steps they have left, descending, the k first still live when the k-th ends, so the
peak is `max_k (tokens of the k first now + k * steps left of the k-th)`. Between two ends the sum
only grows, so no other moment can be the peak.

A sequence of `n` tokens takes `ceil(n / page_tokens)` pages, and the sum over `m` sequences is at
most `(their tokens + m * (page_tokens - 1)) / page_tokens`. With that bound the peak with one more
is found by bisection.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import accumulate

Growth = tuple[int, int]
"""(steps, tokens): one more token in each of so many steps, from so many on; then all are freed."""


class PagePeak:
    """A set of growths, all in step."""

    def __init__(self, page_tokens: int, growths: Iterable[Growth] = ()) -> None:
        self._page_tokens = page_tokens
        self._growths = list(growths)
        self._is_sorted = False

    def __len__(self) -> int:
        return len(self._growths)

    def add(self, growth: Growth) -> None:
        """Let one more grow with the others."""
        self._growths.append(growth)
        self._is_sorted = False

    def with_one_more(self, growth: Growth) -> int:
        """Return the peak in pages if this one grew beside the others."""
        if not self._is_sorted:
            self._sort()
        num_steps, num_tokens = growth
        num_longer = bisect_left(self._ends, -num_steps)
        num_as_long = bisect_right(self._ends, -num_steps)
        num_tokens += self._page_tokens - 1
        peak = self._sums[num_as_long] + num_tokens + num_steps * (num_as_long + 1)
        if num_longer:  # when those end, this one is gone
            peak = max(peak, self._peaks[num_longer - 1])
        if num_longer < len(self._ends):  # when those end, this one is there and has grown
            peak = max(peak, self._grown_peaks[num_longer] + num_tokens)
        return peak // self._page_tokens

    def _sort(self) -> None:
        """Order by the end, last first, and sum up from there."""
        self._is_sorted = True
        slack = self._page_tokens - 1
        self._growths.sort(reverse=True)
        self._ends = [-num_steps for num_steps, _ in self._growths]
        self._sums = [0, *accumulate([num_tokens + slack for _, num_tokens in self._growths])]
        at_ends = [
            total - num * end
            for num, (total, end) in enumerate(zip(self._sums[1:], self._ends, strict=True), 1)
        ]
        grown = [total - end for total, end in zip(at_ends, self._ends, strict=True)]
        self._peaks = list(accumulate(at_ends, max))  # the highest up to there
        self._grown_peaks = list(accumulate(reversed(grown), max))[::-1]  # and from there on
