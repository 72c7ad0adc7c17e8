"""One request on its way: which tokens it has, which are computed, which pages hold them.

    [0, num_computed)                   valid KV in the pages, once the launched steps have run
    [num_computed, num_tokens)          to compute; the step that reaches the end samples the next
    [len(token_ids), num_tokens)        awaited: sampled by a launched step, ids not known yet

There is no prefill or decode phase: a sequence catches up with its own tokens within each step's
budget. Preemption sets `num_computed` back to 0 and nothing else: a token on the way still comes.
"""

from __future__ import annotations

from typing import Final

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.page_table import PageTable
from loraplex_scheduler.plan import (
    FinishReason,
    PlannedAdapter,
    Request,
    SequenceStep,
    StartTimes,
)
from loraplex_scheduler.prompt_reading import PromptReading

_NO_TOKENS: Final[frozenset[int]] = frozenset()


class Sequence:
    """Owned by the scheduler, from `add` to the terminal event.

    What every step asks of hundreds of sequences is an attribute, not a property.

    Attributes:
        service_key: orders sequences by priority, then age; the last of the running gives way.
        num_adapter_pages: pages of all of them; 0 for the base model.
        max_len: tokens of prompt and answer that it may have at most, by model and pool.
        last_len: so many tokens complete it: `max_len`, or earlier by its own `max_tokens`.
        min_len: with fewer tokens, none of `end_token_ids` may be drawn.
        num_tokens: tokens of prompt and answer, awaited ones included.
        end_token_ids: each ends it; never empty of the model's own unless it ignores those.
        adapters: those it runs with, and where their matrices lie inside their pages.
        planned: where they lie in the pool, while it runs.
        num_cached: tokens of the prompt found in the prefix cache when it was first admitted; None
            before.
        is_live: its terminal event has not been written.
        reading: what it wants of its prompt beside the next token; None for nothing.
        load_since_s: since when it has waited for its adapters alone; None while it does not.
        load_s: how long it did, before its first step.
        started_s: when its first step was scheduled; None before.
    """

    def __init__(
        self,
        request: Request,
        order: int,
        table: PageTable,
        layouts: tuple[AdapterLayout, ...],
        max_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.adapter_id = request.adapter.adapter_id if request.adapter else None
        self.order = order
        self.service_key = (request.priority, request.arrival_s, order)
        self.table = table
        self.adapters = tuple(
            (manifest, layout)
            for (manifest, _), layout in zip(request.adapters, layouts, strict=True)
        )
        self.num_adapter_pages = sum(layout.num_pages for layout in layouts)
        self.max_len = max_len
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.last_len = min(max_len, self.num_prompt + request.sampling.max_tokens)
        self.num_tokens = self.num_prompt
        self.num_computed = 0
        sampling = request.sampling
        self.min_len = self.num_prompt + sampling.min_tokens
        eos = _NO_TOKENS if sampling.ignore_eos else eos_token_ids
        self.end_token_ids = sampling.stop_token_ids | eos
        self.planned: dict[str, PlannedAdapter] = {}
        self.num_cached: int | None = None
        self.is_live = True
        self.needs_history = request.sampling.needs_history
        self.reading = PromptReading(request) if PromptReading.is_wanted(request) else None
        self.load_since_s: float | None = None
        self.load_s = 0.0
        self.started_s: float | None = None

    def uses(self, adapter_id: str) -> bool:
        """Whether it runs with this adapter, first or not."""
        return any(manifest.adapter_id == adapter_id for manifest, _ in self.adapters)

    @property
    def num_cached_text(self) -> int:
        """`num_cached` without virtual tokens, which are nobody's text."""
        return max(0, (self.num_cached or 0) - self.request.num_virtual)

    @property
    def num_awaited(self) -> int:
        """Tokens sampled by launched steps whose ids are not known yet."""
        return self.num_tokens - len(self.token_ids)

    @property
    def num_pending(self) -> int:
        """Tokens without KV; at least 1 while the sequence lives."""
        return self.num_tokens - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens of the answer, awaited ones included."""
        return self.num_tokens - self.num_prompt

    @property
    def is_complete(self) -> bool:
        """It has as many tokens as it may have, awaited ones included: nothing is left to run."""
        return self.num_tokens >= self.last_len

    @property
    def needs_known_tokens(self) -> bool:
        """Its next token cannot be sampled before the ids of the awaited ones are known."""
        return self.needs_history and self.num_awaited > 0

    def step(self, num_tokens: int) -> SequenceStep:
        """Describe the computation of the next `num_tokens` tokens."""
        start, token_ids = self.num_computed, self.token_ids
        stop = start + num_tokens
        num_known = len(token_ids)
        assert self.num_tokens - num_known <= 1, "only the step before hands a token over"
        is_sampled = stop == self.num_tokens
        step = SequenceStep(
            self.request,
            start,
            num_tokens,
            tuple(token_ids[start:stop]),
            self.table.pages,
            is_sampled,
            stop > num_known,
        )
        if is_sampled and self.needs_history:
            assert stop == num_known, "the last step must be booked first"
            step.history = tuple(token_ids[self.request.num_virtual :])
        if self.num_tokens < self.min_len:
            step.banned_token_ids = self.end_token_ids
        if self.reading is not None and not self.reading.is_over:
            step.wants_states = True
        return step

    @property
    def max_cached(self) -> int:
        """How many of its tokens it may take from the prefix cache when it is admitted.

        The last one is computed in any case: the next one is drawn from it.
        """
        if self.reading is not None and self.reading.needs_all:
            return 0
        return self.num_tokens - 1

    def wait_for_load(self, now: float) -> None:
        """Nothing but its adapters keeps it from running."""
        if self.load_since_s is None:
            self.load_since_s = now

    def end_load_wait(self, now: float) -> None:
        """Its adapters are there, or it waits for something else."""
        if self.load_since_s is not None:
            self.load_s += now - self.load_since_s
            self.load_since_s = None

    def start_times(self, now: float) -> StartTimes:
        """Return how it came to its first token, which is here `now`."""
        started_s = now if self.started_s is None else self.started_s
        queue_s = max(0.0, started_s - self.request.arrival_s - self.load_s)
        return StartTimes(queue_s, self.load_s, now - started_s)

    def publish_drafted(self, step: SequenceStep) -> None:
        """Let the prefix cache have what a drafted step computes, for others of this very step."""
        num_known = min(step.start + step.num_tokens, len(self.token_ids))
        self.table.publish(self.token_ids, num_known, may_replace=False)

    def publish_computed(self) -> None:
        """Let the prefix cache have all that has KV and known ids."""
        num_known = min(self.num_computed, len(self.token_ids))
        self.table.publish(self.token_ids, num_known, may_replace=True)

    def advance(self, step: SequenceStep) -> None:
        """Count what a launched step computes as computed, and what it samples as awaited."""
        assert step.start == self.num_computed, "the step was planned for another state"
        self.num_computed += step.num_tokens
        self.num_tokens += step.is_sampled

    def append(self, token_id: int) -> FinishReason | None:
        """The id of the oldest awaited token is known; return how it ends the sequence, or None."""
        token_ids = self.token_ids
        token_ids.append(token_id)
        num_known = len(token_ids)
        assert num_known <= self.num_tokens, "no step sampled this token"
        if token_id in self.end_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_known >= self.last_len else None
