"""When a newcomer would get its first token, if it joined the queue now.

The steps to come are played through by the page and the token, not one by one: in order of service
each sequence ahead waits until a place and its pages are there, which those who run give back
when they end, and then takes its prompt's share of the steps' budget. Answers have the lengths
that `AnswerLengths` expects, and nobody else arrives.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from itertools import islice
from typing import Final, NamedTuple, Protocol

from loraplex_scheduler.answer_lengths import AnswerLengths
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.sequence import Sequence
from loraplex_scheduler.step_times import StepLoad, StepTimes
from loraplex_scheduler.waiting import Ahead, WaitingQueue

#: Waiting sequences that are played through; those behind go at the pace of the later half.
_MAX_AHEAD: Final = 128


class Forecast(NamedTuple):
    """Seconds from now to the first token, and from the first to the last."""

    first_token_s: float
    answer_s: float


class Situation(Protocol):
    """What there is to look at; implemented by the scheduler."""

    @property
    def limits(self) -> SchedulerLimits: ...

    @property
    def running(self) -> Collection[Sequence]: ...

    @property
    def waiting(self) -> WaitingQueue: ...

    @property
    def num_obtainable(self) -> int:
        """Pages that are free or could be made free by eviction."""

    def is_resident(self, adapter_id: str) -> bool: ...


def everybody(waiting: WaitingQueue) -> Ahead:
    """Return the whole queue as what is ahead of somebody at its end."""
    ahead = list(islice(waiting, _MAX_AHEAD))
    return Ahead(ahead, len(waiting) - len(ahead))


def predict(
    newcomer: Sequence,
    situation: Situation,
    times: StepTimes,
    lengths: AnswerLengths,
    ahead: Ahead | None = None,
) -> Forecast:
    """Foresee the first token of a sequence that waits or would wait from now on.

    Takes O((n + m) log n) for n running sequences and the first m waiting ones.

    Args:
        ahead: who is served before it; default: whom the queue says.
    """
    if ahead is None:
        ahead = situation.waiting.ahead_of(newcomer, _MAX_AHEAD)
    sequences = ahead.sequences
    *rests, own_rest = lengths.rests([*sequences, newcomer])
    future = _Future(situation, times, lengths, newcomer)
    half, halfway_s = len(sequences) // 2, 0.0
    for i, (sequence, rest) in enumerate(zip(sequences, rests, strict=True)):
        if i == half:
            halfway_s = future.now_s
        future.serve(sequence, rest)
    if ahead.num_more:
        pace_s = (future.now_s - halfway_s) / (len(sequences) - half)
        future.now_s += ahead.num_more * pace_s
    return future.serve_last(newcomer, own_rest)


class _Future:
    """The state of the engine some time from now, `now_s`."""

    def __init__(
        self, situation: Situation, times: StepTimes, lengths: AnswerLengths, newcomer: Sequence
    ) -> None:
        self._situation = situation
        self._times = times
        self._budget = situation.limits.max_step_tokens
        self._num_running = len(situation.running)
        self._num_places = situation.limits.max_running - self._num_running
        self._num_pages = situation.num_obtainable
        self._ends: list[tuple[float, int]] = []  # after which step, and how many pages come free
        self._adapters: dict[str, int] = {}  # in use, with their pages
        self._absent: set[str] = set()
        self._loads_s = 0.0
        self._num_steps = 0.0
        self.now_s = 0.0
        kv_tokens, num_to_catch_up = self._survey(lengths)
        self._fit_times(kv_tokens, newcomer)
        self._compute(num_to_catch_up)

    def serve(self, sequence: Sequence, rest: float) -> None:
        """Go on until the sequence runs and its prompt is computed.

        Args:
            rest: expected tokens of its answer.
        """
        self._start(sequence, rest)
        self._compute(sequence.num_tokens * self._uncached)

    def serve_last(self, newcomer: Sequence, rest: float) -> Forecast:
        """Go on until the newcomer has its first token, which takes a whole step at least."""
        self._start(newcomer, rest)
        if newcomer.adapter_id in self._absent:
            self.now_s = max(self.now_s, self._loads_s)
        found = newcomer.table.match(newcomer.token_ids, newcomer.num_tokens - 1)
        num_tokens = newcomer.num_tokens - found.num_tokens
        num_steps = max(1.0, num_tokens / max(1, self._budget - self._num_running))
        self.now_s += num_steps * self._step_s + num_tokens * self._token_s
        return Forecast(self.now_s, rest * self._step_s)

    @property
    def _step_s(self) -> float:
        """The time of a step without prompts."""
        return self._fixed_s + self._num_running * self._sequence_s

    def _survey(self, lengths: AnswerLengths) -> tuple[int, int]:
        """Look at who runs; return the tokens they have, and those of prompts still to compute."""
        running, adapters = self._situation.running, self._adapters
        kv_tokens = num_to_catch_up = num_cached = num_prompt = num_growth = 0
        for sequence, rest in zip(running, lengths.rests(running), strict=True):
            num_tokens, table = sequence.num_tokens, sequence.table
            kv_tokens += num_tokens
            if num_tokens - sequence.num_computed > 1:
                num_to_catch_up += num_tokens - sequence.num_computed
            num_prompt += sequence.num_prompt
            num_cached += sequence.num_cached or 0
            growth = table.pages_missing(num_tokens + int(rest / 2))
            num_growth += growth
            num_freed = len(table.pages) + growth
            adapter_id = sequence.adapter_id
            if adapter_id is not None and adapter_id not in adapters:
                adapters[adapter_id] = sequence.num_adapter_pages
                num_freed += adapters[adapter_id]
            self._ends.append((rest, num_freed))
        heapq.heapify(self._ends)
        self._num_pages -= num_growth
        self._uncached = 1.0 - num_cached / num_prompt if num_prompt else 1.0
        return kv_tokens, num_to_catch_up

    def _fit_times(self, kv_tokens: int, newcomer: Sequence) -> None:
        """Take the time of a step to be linear from here on, which saves asking for each."""
        num, step_s = len(self._ends), self._times.step_s
        adapter_pages = sum(self._adapters.values())
        if not num:
            num, kv_tokens = 1, newcomer.num_tokens
            adapter_pages = newcomer.num_adapter_pages
        full_s = step_s(StepLoad(num, num, kv_tokens, adapter_pages))
        budget = self._budget
        fuller = StepLoad(num + budget, num, kv_tokens + budget, adapter_pages)
        self._fixed_s = step_s(StepLoad(0, 0, 0, 0))
        self._sequence_s = (full_s - self._fixed_s) / num
        self._token_s = (step_s(fuller) - full_s) / budget

    def _start(self, sequence: Sequence, rest: float) -> None:
        """Go on until there are a place and pages for a sequence, and take them.

        Half of what answers grow is reckoned with: those who run are halfway on average.
        """
        num_pages = sequence.table.pages_missing(sequence.num_tokens + int(rest / 2))
        adapter_id = sequence.adapter_id
        if adapter_id is not None and adapter_id not in self._adapters:
            num_pages += self._use(adapter_id, sequence.num_adapter_pages)
        ends = self._ends
        while ends and (
            ends[0][0] <= self._num_steps or self._num_places < 1 or self._num_pages < num_pages
        ):
            end, num_freed = heapq.heappop(ends)
            if end > self._num_steps:
                self.now_s += (end - self._num_steps) * self._step_s
                self._num_steps = end
            self._num_running -= 1
            self._num_places += 1
            self._num_pages += num_freed
        self._num_running += 1
        self._num_places -= 1
        self._num_pages -= num_pages
        heapq.heappush(ends, (self._num_steps + rest, num_pages))

    def _use(self, adapter_id: str, num_pages: int) -> int:
        """Let an adapter be used by one more than before; return the pages that takes."""
        self._adapters[adapter_id] = num_pages
        if not self._situation.is_resident(adapter_id):
            self._absent.add(adapter_id)
            self._loads_s += self._times.adapter_s(num_pages)
        return num_pages

    def _compute(self, num_tokens: float) -> None:
        """Go on until so many tokens of prompts are computed beside the decodes."""
        num_steps = num_tokens / max(1, self._budget - self._num_running)
        self._num_steps += num_steps
        self.now_s += num_steps * self._step_s + num_tokens * self._token_s
