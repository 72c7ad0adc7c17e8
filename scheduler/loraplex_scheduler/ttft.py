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
_MAX_AHEAD: Final = 256


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
    future = _Future(situation, times, lengths, newcomer)
    halfway_s = 0.0
    for i, sequence in enumerate(ahead.sequences):
        if i == len(ahead.sequences) // 2:
            halfway_s = future.now_s
        future.serve(sequence)
    if ahead.num_more:
        num_later = len(ahead.sequences) - len(ahead.sequences) // 2
        future.now_s += ahead.num_more * (future.now_s - halfway_s) / num_later
    return future.serve_last(newcomer)


class _Future:
    """The state of the engine some time from now, `now_s`."""

    def __init__(
        self, situation: Situation, times: StepTimes, lengths: AnswerLengths, newcomer: Sequence
    ) -> None:
        self._situation = situation
        self._times = times
        self._lengths = lengths
        self._budget = situation.limits.max_step_tokens
        self._num_places = situation.limits.max_running - len(situation.running)
        self._num_running = len(situation.running)
        self._num_pages = situation.num_obtainable
        self._new_adapters: set[str] = set()
        self._loads_s = 0.0
        self._ends: list[tuple[float, int]] = []  # at which step, and how many pages come free
        self._steps = 0.0
        self.now_s = 0.0
        num_to_catch_up = self._survey(newcomer)
        self._compute(num_to_catch_up)

    def serve(self, sequence: Sequence) -> None:
        """Go on until the sequence runs and its prompt is computed."""
        self._start(sequence)
        self._compute(sequence.num_tokens * self._uncached)

    def serve_last(self, newcomer: Sequence) -> Forecast:
        """Go on until the newcomer has its first token, which takes a whole step at least."""
        self._start(newcomer)
        if newcomer.adapter_id in self._new_adapters:
            self.now_s = max(self.now_s, self._loads_s)
        found = newcomer.table.match(newcomer.token_ids, newcomer.num_tokens - 1)
        num_tokens = newcomer.num_tokens - found.num_tokens
        per_step = max(1, self._budget - self._num_running)
        num_steps = max(1.0, num_tokens / per_step)
        self.now_s += num_steps * self._step_s() + num_tokens * self._token_s
        return Forecast(self.now_s, self._lengths.rest(newcomer) * self._step_s())

    def _survey(self, newcomer: Sequence) -> int:
        """Look at who runs; return the tokens of prompts that they still have to compute."""
        running = self._situation.running
        kv_tokens = num_to_catch_up = num_cached = num_prompt = 0
        adapters: dict[str, int] = {}
        for sequence, rest in zip(running, self._lengths.rests(running), strict=True):
            num_tokens, adapter_id = sequence.num_tokens, sequence.adapter_id
            kv_tokens += num_tokens
            num_pending = num_tokens - sequence.num_computed
            if num_pending > 1:
                num_to_catch_up += num_pending
            num_cached += sequence.num_cached or 0
            num_prompt += sequence.num_prompt
            if adapter_id is not None and adapter_id not in adapters:
                adapters[adapter_id] = sequence.num_adapter_pages
            table = sequence.table
            num_more = table.pages_missing(num_tokens + int(rest / 2))
            self._num_pages -= num_more
            self._ends.append((rest, len(table.pages) + num_more))
        heapq.heapify(self._ends)
        self._uncached = 1.0 - num_cached / num_prompt if num_prompt else 1.0
        num = max(1, len(running))
        pages = sum(adapters.values())
        if not running:
            kv_tokens, pages = newcomer.num_tokens, newcomer.num_adapter_pages
        step_s = self._times.step_s
        full_s = step_s(StepLoad(num, num, kv_tokens, pages))
        self._empty_step_s = step_s(StepLoad(0, 0, 0, 0))
        self._sequence_s = (full_s - self._empty_step_s) / num
        fuller = StepLoad(num + self._budget, num, kv_tokens + self._budget, pages)
        self._token_s = (step_s(fuller) - full_s) / self._budget
        return num_to_catch_up

    def _start(self, sequence: Sequence) -> None:
        """Go on until there are a place and pages for a sequence, and take them.

        Half of what answers grow is reckoned with: those who run are halfway on average.
        """
        rest = self._lengths.rest(sequence)
        num_pages = sequence.table.pages_missing(sequence.num_tokens + int(rest / 2))
        num_needed = num_pages
        adapter_id = sequence.adapter_id
        if adapter_id is not None and self._is_absent(adapter_id):
            self._new_adapters.add(adapter_id)
            self._loads_s += self._times.adapter_s(sequence.num_adapter_pages)
            num_needed += sequence.num_adapter_pages
        while self._ends and (self._num_places < 1 or self._num_pages < num_needed):
            end, num_freed = heapq.heappop(self._ends)
            if end > self._steps:
                self.now_s += (end - self._steps) * self._step_s()
                self._steps = end
            self._num_running -= 1
            self._num_places += 1
            self._num_pages += num_freed
        self._num_running += 1
        self._num_places -= 1
        self._num_pages -= num_needed
        heapq.heappush(self._ends, (self._steps + rest, num_pages))

    def _is_absent(self, adapter_id: str) -> bool:
        is_new = adapter_id not in self._new_adapters
        return is_new and not self._situation.is_resident(adapter_id)

    def _compute(self, num_tokens: float) -> None:
        """Go on until so many tokens of prompts are computed beside the decodes."""
        num_steps = num_tokens / max(1, self._budget - self._num_running)
        self._steps += num_steps
        self.now_s += num_steps * self._step_s() + num_tokens * self._token_s

    def _step_s(self) -> float:
        """Return the time of a step without prompts."""
        return self._empty_step_s + self._num_running * self._sequence_s
