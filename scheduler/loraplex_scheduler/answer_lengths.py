"""How long answers become: what is known of a sequence that runs, before it has ended."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import pairwise
from math import exp
from typing import Final

from loraplex_scheduler.sequence import Sequence

#: An adapter's mean moves by one part in so many per answer, once it has seen as many.
_WINDOW: Final = 32

#: Answers of an adapter's own that weigh as much as the mean over all adapters.
_FEW: Final = 4.0

#: The mean before the first answer, of a weight of `_FEW`: about that of published chat traces.
_PRIOR_LEN: Final = 200.0

_MAX_ADAPTERS: Final = 16384

#: Lengths relative to the mean are told apart in bins of this width; the last bin has no end.
_BIN_WIDTH: Final = 0.25
_NUM_BINS: Final = 24

#: Answers after which the table of remaining lengths is made anew, and what an old one counts then.
_REFRESH_EVERY: Final = 32
_DECAY: Final = 0.95

#: Answers that the shape before the first one weighs as much as: exponential, so without memory.
_PRIOR_WEIGHT: Final = 16.0


class AnswerLengths:
    """Learned means by adapter, and one learned shape of the distribution for all of them.

    The expected rest of an answer of which `g` tokens are there is `m * R(g / m)`: `m` the mean of
    its adapter, `R(x)` the mean of `X - x` over answers `X > x` in units of the mean. So one that
    has outlived its mean is expected to last as long as such ones did before, and not to end now.
    """

    def __init__(self) -> None:
        self._means: OrderedDict[str | None, tuple[float, float]] = OrderedDict()
        self._estimates: dict[str | None, float] = {}  # with the mean over all for a few more
        self._mean, self._weight = _PRIOR_LEN, _FEW
        reached = [exp(-i * _BIN_WIDTH) for i in range(_NUM_BINS)] + [0.0]
        self._bins = [_PRIOR_WEIGHT * (a - b) for a, b in pairwise(reached)]
        self._rests = _rests(self._bins)
        self._num_new = 0

    def mean(self, adapter_id: str | None) -> float:
        """Return the expected tokens of an answer of this adapter, whatever its limit."""
        return self._estimates.get(adapter_id, self._mean)

    def rests(self, sequences: Iterable[Sequence]) -> list[float]:
        """Return for each live sequence the expected tokens that it still has to generate; at
        least 1.
        """
        table, last, bins_per_mean = self._rests, _NUM_BINS - 1, 1 / _BIN_WIDTH
        estimates, unknown = self._estimates, self._mean
        rests = []
        for sequence in sequences:
            num_tokens = sequence.num_tokens
            mean = estimates.get(sequence.adapter_id, unknown)
            place = int((num_tokens - sequence.num_prompt) * bins_per_mean / mean)
            rest = mean * table[place if place < last else last]
            left = sequence.last_len - num_tokens
            rests.append(left if rest > left else rest if rest > 1.0 else 1.0)
        return rests

    def rest(self, sequence: Sequence) -> float:
        """Return `rests` of one sequence."""
        return self.rests((sequence,))[0]

    def observe(self, sequence: Sequence) -> None:
        """A sequence ended by itself, with all its tokens."""
        adapter_id, length = sequence.adapter_id, max(1, sequence.num_generated)
        self._bins[_bin(length / self.mean(adapter_id))] += 1.0
        self._num_new += 1
        if self._num_new == _REFRESH_EVERY:
            self._num_new = 0
            self._rests = _rests(self._bins)
            self._bins = [_DECAY * count for count in self._bins]
        self._weight = min(self._weight + 1.0, 8.0 * _WINDOW)
        self._mean += (length - self._mean) / self._weight
        mean, weight = self._means.pop(adapter_id, (0.0, 0.0))
        weight = min(weight + 1.0, _WINDOW)
        mean += (length - mean) / weight
        self._means[adapter_id] = mean, weight
        self._estimates[adapter_id] = (weight * mean + _FEW * self._mean) / (weight + _FEW)
        if len(self._means) > _MAX_ADAPTERS:
            forgotten, _ = self._means.popitem(last=False)
            del self._estimates[forgotten]


def _bin(length: float) -> int:
    return min(int(length / _BIN_WIDTH), _NUM_BINS - 1)


def _rests(counts: list[float]) -> list[float]:
    """Return by bin the mean of what is left at its start, over all that get there."""
    rests = [1.0] * len(counts)  # of the last bin no more is known than of an exponential tail
    num = counts[-1] + 1e-9
    total = num  # of what is left, summed over all
    for i in range(len(counts) - 2, -1, -1):
        total += num * _BIN_WIDTH + counts[i] * _BIN_WIDTH / 2
        num += counts[i]
        rests[i] = total / num
    return rests
