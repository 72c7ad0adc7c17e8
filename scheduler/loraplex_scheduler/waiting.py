"""Who waits, and in which order they are served.

Priorities are strict, whatever the order: a lower number goes first, as in vLLM. Orders are free of
starvation within a priority.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from loraplex_scheduler.sequence import Sequence

Key = tuple[float, ...]
"""Places a sequence; the smallest is served first. Never changes while the sequence waits, and ends
in `Sequence.order`, with either sign, so no two are equal."""

#: Under `deadline_key`, who has no deadline is as urgent as one who must be served in this time.
PATIENCE_S: Final = 60.0

#: A queue with `latest_key` should serve the oldest at least this often, in admissions.
OLDEST_EVERY: Final = 8


@dataclass(frozen=True)
class Ahead:
    """Who will be served before somebody: the first of them in rough order, and how many more."""

    sequences: list[Sequence]
    num_more: int


class WaitingQueue(Protocol):
    """Owned by the roster; holds every sequence that waits, each once.

    An order of service must be starvation-free: who waits long enough comes first.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]:
        """Every waiting sequence, in no particular order."""

    def __contains__(self, sequence: object) -> bool:
        """Whether it waits; O(1), as every step asks it of many."""

    def push(self, sequence: Sequence) -> None:
        """A sequence arrives, or comes back because it was preempted."""

    def remove(self, sequence: Sequence) -> None:
        """It was admitted or ended."""

    def in_order(self) -> Iterator[Sequence]:
        """Yield each waiting sequence once, in order of service, lazily.

        The one yielded last may be removed and charged before the next is asked for, and that
        decides who is next; nothing else may change meanwhile.
        """

    def ahead_of(self, newcomer: Sequence, limit: int) -> Ahead:
        """Foresee who is served before a sequence that waits or would wait from now on.

        Args:
            limit: list at most so many, and count the others.
        """

    def charge_prompt(self, sequence: Sequence, num_tokens: int) -> None:
        """A sequence was admitted and `num_tokens` of its tokens are to be computed for it."""

    def charge_outputs(self, sequences: Collection[Sequence]) -> None:
        """Each of these got one token more; called once per step."""

    def settle(self, sequence: Sequence) -> None:
        """A sequence ended, waiting or not, and will not be charged any more."""


def arrival_key(sequence: Sequence) -> tuple[int, float, int]:
    """First come, first served. Starves nobody: only those who came before go before."""
    return sequence.service_key


def latest_key(sequence: Sequence) -> Key:
    """Last come, first served: under overload it serves most of those who can still be served soon
    (S-LoRA, theorem B.1). It starves; give the queue `oldest_every`.
    """
    priority, arrival_s, order = sequence.service_key
    return priority, -arrival_s, -order


def deadline_key(sequence: Sequence) -> Key:
    """Earliest deadline first: that of the first token, else of the whole answer.

    Who has none, or a distant one, counts as due `PATIENCE_S` after its arrival. So nobody starves:
    those who arrive later than that all go behind.
    """
    request = sequence.request
    due_s = request.arrival_s + PATIENCE_S
    if request.first_token_by_s is not None:
        due_s = min(due_s, max(request.first_token_by_s, request.arrival_s))
    elif request.deadline_s is not None:
        due_s = min(due_s, max(request.deadline_s, request.arrival_s))
    return request.priority, due_s, request.arrival_s, sequence.order


class OrderedQueue:
    """A waiting queue in the order of a fixed key; charges nobody for anything.

    A sorted list: finding a place takes O(log n) comparisons, and moving the pointers behind it
    is a copy of n words at most, some microseconds for 10,000.
    """

    def __init__(self, key: Callable[[Sequence], Key], *, oldest_every: int = 0) -> None:
        """
        Args:
            oldest_every: of so many admissions, at least one goes to the oldest sequence of the
                first priority, whatever the key says; 0 for a key that starves nobody by itself.
        """
        self._key = key
        self._keys: dict[Sequence, Key] = {}
        self._sequences: list[Sequence] = []
        self._oldest_every = oldest_every
        self._by_age: list[Sequence] = []  # empty if nobody asks for the oldest
        self._num_younger_served = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._keys

    def push(self, sequence: Sequence) -> None:
        """A sequence arrives, or comes back to its old place."""
        self._keys[sequence] = self._key(sequence)
        insort(self._sequences, sequence, key=self._keys.__getitem__)
        if self._oldest_every:
            insort(self._by_age, sequence, key=arrival_key)

    def remove(self, sequence: Sequence) -> None:
        """It was admitted or ended."""
        del self._sequences[self._num_before(self._keys[sequence])]
        del self._keys[sequence]
        if self._oldest_every:
            place = bisect_left(self._by_age, sequence.service_key, key=arrival_key)
            if place == 0:
                self._num_younger_served = 0
            else:
                self._num_younger_served += 1
            del self._by_age[place]

    def in_order(self) -> Iterator[Sequence]:
        """Yield each waiting sequence once, see `WaitingQueue`."""
        sequences, place = self._sequences, 0
        passed: set[Sequence] = set()
        while place < len(sequences):
            sequence = sequences[place]
            is_oldest_due = self._oldest_every and self._is_oldest_due
            if is_oldest_due and self._by_age[0] not in passed:
                oldest = self._by_age[0]
                yield oldest
                if oldest in self._keys:
                    passed.add(oldest)
                continue
            if sequence in passed:
                place += 1
                continue
            yield sequence
            if place < len(sequences) and sequences[place] is sequence:
                place += 1
                if self._oldest_every:
                    passed.add(sequence)

    def ahead_of(self, newcomer: Sequence, limit: int) -> Ahead:
        """Return who has a smaller key."""
        num_ahead = self._num_before(self._key(newcomer))
        return Ahead(self._sequences[: min(num_ahead, limit)], max(0, num_ahead - limit))

    def charge_prompt(self, sequence: Sequence, num_tokens: int) -> None:
        """Tokens change nothing here."""

    def charge_outputs(self, sequences: Collection[Sequence]) -> None:
        """Tokens change nothing here."""

    def settle(self, sequence: Sequence) -> None:
        """Nothing was charged."""

    @property
    def _is_oldest_due(self) -> bool:
        return self._num_younger_served >= self._oldest_every - 1

    def _num_before(self, key: Key) -> int:
        return bisect_left(self._sequences, key, key=self._keys.__getitem__)
