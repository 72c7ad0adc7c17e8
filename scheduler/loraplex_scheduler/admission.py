"""How much of the pool a newcomer must leave to those who run already."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Protocol

from loraplex_scheduler.answer_lengths import AnswerLengths
from loraplex_scheduler.page_peak import PagePeak
from loraplex_scheduler.sequence import Sequence


class AdmissionPolicy(Protocol):
    """Owned by the scheduler; asked between `begin` and the next `begin` of one step each."""

    def begin(self, running: Collection[Sequence]) -> None:
        """A step's admissions start; these run already."""

    def is_enough(self, num_pages: int, newcomer: Sequence) -> bool:
        """Whether a newcomer may run if so many pages are still free or evictable then.

        It has its own by then: those for all its tokens so far, and its adapter's.
        """

    def admitted(self, newcomer: Sequence) -> None:
        """It runs now, with pages for all its tokens so far."""

    def ended(self, sequence: Sequence) -> None:
        """A sequence ended by itself; its `num_generated` is how long its answer became."""


class Greedy:
    """Admits whoever has room now, and leaves one page to each of those who run.

    Fills the pool best, and pays with preemptions when answers grow longer than the room left.
    """

    def __init__(self, lengths: AnswerLengths) -> None:
        self._lengths = lengths
        self._num_running = 0

    def begin(self, running: Collection[Sequence]) -> None:
        self._num_running = len(running)

    def pages_to_leave(self, newcomer: Sequence) -> int:
        """Return how many pages are just enough."""
        return self._num_running

    def is_enough(self, num_pages: int, newcomer: Sequence) -> bool:
        return num_pages >= self._num_running

    def admitted(self, newcomer: Sequence) -> None:
        self._num_running += 1

    def ended(self, sequence: Sequence) -> None:
        self._lengths.observe(sequence)


class _Reserving(ABC):
    """What `Expected` and `WorstCase` have in common: room is left for the peak of all growths.

    Time is counted in steps from now on, and in step `k` a sequence of `t` tokens needs pages for
    `t + k` tokens, up to its last step: the token sampled last gets no page. Two things put
    sequences out of step; both are counted as more than they are at any moment, so what is reserved
    stays enough:

    - One that catches up with a prompt samples later than in step 0, by as many steps as the
      budget makes of all catching up. It is taken to grow from now on, and to end so much later.
    - Where newcomers are computed apart, all who run pause for a step. It is as if the newcomer
      were one step ahead, so it is taken to have one token more.

    A page that others use, too, does not come free when one of its users ends. Such pages are left
    out on both sides of the account, as if they were held for good (`_num_kept`).
    """

    def __init__(self, lengths: AnswerLengths, page_tokens: int, max_step_tokens: int) -> None:
        """
        Args:
            max_step_tokens: the budget of a step, as in `SchedulerLimits`.
        """
        self._lengths = lengths
        self._page_tokens = page_tokens
        self._max_step_tokens = max_step_tokens
        self._running: list[Sequence] = []
        self._num_old = 0  # of those, how many ran before this step
        self._peak: PagePeak | None = None  # of those who run; made when first asked for
        # Tokens that those who run may have, and have to compute; summed up when first asked for.
        self._sums: tuple[int, int] | None = None
        self._lag = 0
        self._num_to_catch_up = 0
        self._num_held = 0

    def begin(self, running: Collection[Sequence]) -> None:
        self._running = list(running)
        self._num_old = len(self._running)
        self._peak = None
        self._sums = None

    def pages_to_leave(self, newcomer: Sequence) -> int:
        """Return how many pages are just enough."""
        page_tokens, num_tokens = self._page_tokens, newcomer.num_tokens
        num_pages = -(-num_tokens // page_tokens)
        rest = self._rests((newcomer,))[0]
        if not self._running:
            return -(-(num_tokens + rest - 1) // page_tokens) - num_pages
        if self._peak is None:
            self._num_to_catch_up = sum(
                s.num_pending for s in self._running if s.num_tokens - s.num_computed > 1
            )
        lag = self._lag_of(self._num_to_catch_up + num_tokens)
        if self._peak is None or self._lag != lag:
            self._lag = lag
            self._peak = self._survey()
        num_kept = self._num_to_keep(newcomer)
        own_tokens = num_tokens + 1 - num_kept * page_tokens
        peak = self._peak.with_one_more((rest - 1 + lag, own_tokens))
        return max(0, peak - self._num_held - (num_pages - num_kept))

    def is_enough(self, num_pages: int, newcomer: Sequence) -> bool:
        return num_pages >= self._most_pages(newcomer) or num_pages >= self.pages_to_leave(newcomer)

    def admitted(self, newcomer: Sequence) -> None:
        self._running.append(newcomer)
        if self._sums is not None:
            most_tokens, num_to_compute = self._sums
            self._sums = most_tokens + newcomer.last_len, num_to_compute + newcomer.num_pending
        if self._peak is None:
            return
        num_kept = self._num_to_keep(newcomer)
        num_steps = self._rests((newcomer,))[0] - 1 + self._lag
        own_tokens = newcomer.num_tokens + 1 - num_kept * self._page_tokens
        self._peak.add((num_steps, own_tokens))
        self._num_held += len(newcomer.table.pages) - num_kept
        self._num_to_catch_up += newcomer.num_pending

    def ended(self, sequence: Sequence) -> None:
        self._lengths.observe(sequence)

    def _most_pages(self, newcomer: Sequence) -> int:
        """Return as many pages as `pages_to_leave` or more, at a fraction of the cost: what all
        would hold together if each answer became as long as it may, and none ended before another.
        """
        if self._sums is None:
            running = self._running
            most_tokens = sum([s.last_len for s in running])
            self._sums = most_tokens, sum([s.num_tokens - s.num_computed for s in running])
        most_tokens, num_to_compute = self._sums
        lag = self._lag_of(num_to_compute + newcomer.num_tokens)
        num = len(self._running) + 1
        most_tokens += newcomer.last_len + num * (lag + self._page_tokens)
        return most_tokens // self._page_tokens

    def _survey(self) -> PagePeak:
        """Account for those who run."""
        page_tokens, lag, num_held = self._page_tokens, self._lag, 0
        running, growths = self._running, []
        of_each = zip(running, self._rests(running), self._nums_kept(running), strict=True)
        for sequence, rest, num_kept in of_each:
            num_tokens = sequence.num_tokens
            num_steps = rest - 1
            if num_tokens - sequence.num_computed > 1:
                num_steps += lag
            num_held += len(sequence.table.pages) - num_kept
            growths.append((num_steps, num_tokens - num_kept * page_tokens))
        for i in range(self._num_old, len(running)):
            num_steps, num_tokens = growths[i]
            growths[i] = num_steps, num_tokens + 1
        self._num_held = num_held
        return PagePeak(page_tokens, growths)

    def _lag_of(self, num_to_catch_up: int) -> int:
        """Return the steps until the last one that catches up has, after the first."""
        per_step = max(1, self._max_step_tokens - len(self._running))
        return max(0, -(-num_to_catch_up // per_step) - 1)

    @abstractmethod
    def _rests(self, sequences: Collection[Sequence]) -> list[int]:
        """Return how many tokens each will still generate; at least 1."""

    @abstractmethod
    def _nums_kept(self, sequences: Collection[Sequence]) -> list[int]:
        """Return how many pages of each running one do not come free when it ends."""

    @abstractmethod
    def _num_to_keep(self, newcomer: Sequence) -> int:
        """Return that of a newcomer, which has no pages yet."""


class WorstCase(_Reserving):
    """Reserves for answers as long as they may become, as S-LoRA does: nobody is ever preempted.

    Why: if the peak of all growths fits now, it fits after every step, because each growth is then
    one step further at most, and who ends early only leaves sooner. Newcomers are admitted if it
    fits with them. So pages never run out, as long as nothing else takes any of what is left.

    With a prefix cache nearly every page of a prompt may be shared, now or later, so little is
    counted of what those who end give back, and fewer run together than without one.
    """

    def __init__(
        self,
        lengths: AnswerLengths,
        page_tokens: int,
        max_step_tokens: int,
        *,
        has_prefix_cache: bool,
    ) -> None:
        """See `_Reserving`."""
        super().__init__(lengths, page_tokens, max_step_tokens)
        self._has_prefix_cache = has_prefix_cache

    def _rests(self, sequences: Collection[Sequence]) -> list[int]:
        return [s.last_len - s.num_tokens for s in sequences]

    def _nums_kept(self, sequences: Collection[Sequence]) -> list[int]:
        return [s.table.num_shared for s in sequences]

    def _num_to_keep(self, newcomer: Sequence) -> int:
        return newcomer.num_tokens // self._page_tokens if self._has_prefix_cache else 0


class Expected(_Reserving):
    """Reserves for answers as long as they became before, see `AnswerLengths`; when they become
    longer, the newest of those who run gives way.

    Pages that a prompt shares with others are those that were there when it was admitted.
    """

    def pages_to_leave(self, newcomer: Sequence) -> int:
        return max(len(self._running), super().pages_to_leave(newcomer))

    def _rests(self, sequences: Collection[Sequence]) -> list[int]:
        return [int(rest) for rest in self._lengths.rests(sequences)]

    def _nums_kept(self, sequences: Collection[Sequence]) -> list[int]:
        page_tokens = self._page_tokens
        return [(s.num_cached or 0) // page_tokens for s in sequences]

    def _num_to_keep(self, newcomer: Sequence) -> int:
        return 0
