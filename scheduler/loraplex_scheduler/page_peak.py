"""The most pages that sequences will hold at once, if each grows by one token per step and ends.

S-LoRA's check before it admits a request (its `ReqQueue._can_add_new_req`), in pages: of sequences
sorted by the steps they have left, descending, the k first still live when the k-th ends, so the
peak is `max_k (tokens of the k first now + k * steps left of the k-th)`. Between two ends the sum
only grows, so no other moment can be the peak.

A sequence of `n` tokens takes `ceil(n / page_tokens)` pages, and the sum over `m` sequences is at
most `(their tokens + m * (page_tokens - 1)) / page_tokens`. With that bound the peak with one more
is found without counting each of them anew.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import accumulate, count
from operator import mul, sub

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
            peak = max(peak, max(self._at_ends[:num_longer]))
        if num_longer < len(self._ends):  # when those end, this one is there and has grown
            peak = max(peak, max(self._grown[num_longer:]) + num_tokens)
        return peak // self._page_tokens

    def _sort(self) -> None:
        """Order by the end, last first, and sum up from there."""
        self._is_sorted = True
        self._growths.sort(reverse=True)
        slack = self._page_tokens - 1
        ends = self._ends = [-num_steps for num_steps, _ in self._growths]
        self._sums = list(accumulate([tokens + slack for _, tokens in self._growths], initial=0))
        grown = map(mul, count(1), ends)
        self._at_ends = list(map(sub, self._sums[1:], grown))  # all tokens when each ends
        self._grown = list(map(sub, self._at_ends, ends))  # and if one more had grown until then
