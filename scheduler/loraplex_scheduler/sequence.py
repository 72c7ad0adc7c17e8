"""One request on its way: which tokens it has, which are computed, which pages hold them.

    [0, num_computed)                   valid KV in the pages, once the launched steps have run
    [num_computed, num_tokens)          to compute; the step that reaches the end samples the next
    [len(token_ids), num_tokens)        awaited: sampled by a launched step, ids not known yet

There is no prefill or decode phase: a sequence catches up with its own tokens within each step's
budget. Preemption sets `num_computed` back to 0 and nothing else: a token on the way still comes.
"""

from __future__ import annotations

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.page_table import PageTable
from loraplex_scheduler.plan import FinishReason, Request, SequenceStep


class Sequence:
    """Owned by the scheduler, from `add` to the terminal event.

    `max_len` tokens, prompt and answer, are the most it may have.
    """

    def __init__(
        self,
        request: Request,
        order: int,
        table: PageTable,
        adapter_layout: AdapterLayout | None,
        max_len: int,
    ) -> None:
        self.request = request
        self.order = order
        self.table = table
        self.adapter_layout = adapter_layout
        self.max_len = max_len
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_computed = 0
        self.num_awaited = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def adapter_id(self) -> str | None:
        return self.request.adapter.adapter_id if self.request.adapter else None

    @property
    def service_key(self) -> tuple[int, float, int]:
        """Orders sequences by priority, then age; the last of the running gives way first."""
        return self.request.priority, self.request.arrival_s, self.order

    @property
    def num_adapter_pages(self) -> int:
        """Pages of its adapter; 0 for the base model."""
        return self.adapter_layout.num_pages if self.adapter_layout else 0

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer, awaited ones included."""
        return len(self.token_ids) + self.num_awaited

    @property
    def num_pending(self) -> int:
        """Tokens without KV; at least 1 while the sequence lives."""
        return self.num_tokens - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens of the answer, awaited ones included."""
        return self.num_tokens - len(self.request.prompt_token_ids)

    @property
    def is_complete(self) -> bool:
        """It has as many tokens as it may have, awaited ones included: nothing is left to run."""
        return (
            self.num_generated >= self.request.sampling.max_tokens
            or self.num_tokens >= self.max_len
        )

    @property
    def needs_known_tokens(self) -> bool:
        """Its next token cannot be sampled before the ids of the awaited ones are known."""
        return self.num_awaited > 0 and self.request.sampling.has_penalties

    def step(self, num_tokens: int, eos_token_ids: frozenset[int]) -> SequenceStep:
        """Describe the computation of the next `num_tokens` tokens."""
        assert self.num_awaited <= 1, "a step can take over a token from the step before it only"
        start, stop = self.num_computed, self.num_computed + num_tokens
        sampling = self.request.sampling
        is_sampled = stop == self.num_tokens
        assert not (is_sampled and self.needs_known_tokens), "the last step must be booked first"
        return SequenceStep(
            request_id=self.request_id,
            adapter_id=self.adapter_id,
            start=start,
            token_ids=tuple(self.token_ids[start:stop]),
            block_table=self.table.pages[:],
            is_sampled=is_sampled,
            sampling=sampling,
            history=tuple(self.token_ids) if is_sampled and sampling.has_penalties else (),
            num_prompt=len(self.request.prompt_token_ids),
            position=stop,
            banned_token_ids=self._banned(eos_token_ids),
            awaits_token=stop > len(self.token_ids),
        )

    def advance(self, step: SequenceStep) -> None:
        """Count what a launched step computes as computed, and what it samples as awaited."""
        assert step.start == self.num_computed, "the step was planned for another state"
        self.num_computed += step.num_tokens
        self.num_awaited += step.is_sampled

    def append(self, token_id: int) -> None:
        """The id of the oldest awaited token is known."""
        assert self.num_awaited > 0, "no step sampled this token"
        self.token_ids.append(token_id)
        self.num_awaited -= 1

    def finish_reason(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Return how the token just appended ends the sequence, or None."""
        sampling, last = self.request.sampling, self.token_ids[-1]
        if last in sampling.stop_token_ids:
            return FinishReason.STOP
        if last in eos_token_ids and not sampling.ignore_eos:
            return FinishReason.STOP
        if self.is_complete and self.num_awaited == 0:
            return FinishReason.LENGTH
        return None

    def _banned(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        sampling = self.request.sampling
        if self.num_generated >= sampling.min_tokens:
            return frozenset()
        ends = frozenset() if sampling.ignore_eos else eos_token_ids
        return ends | sampling.stop_token_ids
