"""One request on its way: which tokens it has, which are computed, which pages hold them.

    [0, num_computed)              valid KV in the pages
    [num_computed, len(tokens))    to compute; the step that reaches the end samples the next token

There is no prefill or decode phase: a sequence catches up with its own tokens within each step's
budget. Preemption sets `num_computed` back to 0 and nothing else.
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

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def adapter_id(self) -> str | None:
        return self.request.adapter.adapter_id if self.request.adapter else None

    @property
    def num_pending(self) -> int:
        """Tokens without KV; at least 1 while the sequence lives."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    def step(self, num_tokens: int, eos_token_ids: frozenset[int]) -> SequenceStep:
        """Describe the computation of the next `num_tokens` tokens."""
        start, stop = self.num_computed, self.num_computed + num_tokens
        sampling = self.request.sampling
        is_sampled = stop == len(self.token_ids)
        return SequenceStep(
            request_id=self.request_id,
            adapter_id=self.adapter_id,
            start=start,
            token_ids=tuple(self.token_ids[start:stop]),
            block_table=tuple(self.table.pages),
            is_sampled=is_sampled,
            sampling=sampling,
            history=tuple(self.token_ids) if is_sampled and sampling.has_penalties else (),
            num_prompt=len(self.request.prompt_token_ids),
            position=stop,
            banned_token_ids=self._banned(eos_token_ids),
        )

    def finish_reason(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Return how the token just appended ends the sequence, or None."""
        sampling, last = self.request.sampling, self.token_ids[-1]
        if last in sampling.stop_token_ids:
            return FinishReason.STOP
        if last in eos_token_ids and not sampling.ignore_eos:
            return FinishReason.STOP
        if self.num_generated >= sampling.max_tokens or len(self.token_ids) >= self.max_len:
            return FinishReason.LENGTH
        return None

    def _banned(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        sampling = self.request.sampling
        if self.num_generated >= sampling.min_tokens:
            return frozenset()
        ends = frozenset() if sampling.ignore_eos else eos_token_ids
        return ends | sampling.stop_token_ids
