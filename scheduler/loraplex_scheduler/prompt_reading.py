"""What a sequence wants of its prompt beside the next token, and how much of it there is so far."""

from __future__ import annotations

from array import array

from loraplex_scheduler.plan import (
    HIDDEN_UNIT,
    Pooling,
    PromptEvent,
    Request,
    SequenceStep,
    StepResult,
)


class PromptReading:
    """Owned by a sequence that asks for prompt log probabilities or is pooled; few are.

    A sequence that gave way computes its prompt again, while a step launched before may still come:
    what was told is not told twice, and a sum begins again where the prompt does.

    Attributes:
        is_over: nothing more is wanted; never so of one that is pooled.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._num_prompt = len(request.prompt_token_ids)
        self._num_scored = request.num_virtual
        self._sums: tuple[int, ...] = ()
        self._num_summed = 0
        self.is_over = False

    @staticmethod
    def is_wanted(request: Request) -> bool:
        """Whether a request asks for anything of the kind, and its prompt has it."""
        has_next = len(request.prompt_token_ids) - request.num_virtual > 1
        is_scored = request.sampling.prompt_logprobs is not None and has_next
        return request.pooling is not None or is_scored

    @property
    def needs_all(self) -> bool:
        """Every token of the prompt has to be computed: no cached page has what is wanted of it."""
        return self._request.needs_whole_prompt and not self.is_over

    def take(self, step: SequenceStep, result: StepResult) -> list[PromptEvent]:
        """Book what a step found out; return what of it is news."""
        request_id = step.request_id
        if (sums := result.hidden_sums.get(request_id)) is not None:
            self._add(step, sums)
        logprobs = result.prompt_logprobs.get(request_id, ())
        positions = step.scored_positions
        if not logprobs or positions.stop <= self._num_scored:
            return []
        assert positions.start <= self._num_scored, "log probabilities of a prompt are lost"
        news = logprobs[self._num_scored - positions.start :]
        self._num_scored = positions.stop
        self.is_over = self._request.pooling is None and positions.stop == self._num_prompt - 1
        return [PromptEvent(request_id, news)]

    def embedding(self, result: StepResult) -> tuple[float, ...]:
        """Return the embedding, float32, once the last step was taken."""
        if self._request.pooling is Pooling.LAST:
            return result.embeddings[self._request.request_id]
        assert self._num_summed == self._num_prompt, "a part of the prompt is missing"
        scale = HIDDEN_UNIT / (self._num_prompt - self._request.num_virtual)
        return tuple(array("f", [value * scale for value in self._sums]))

    def _add(self, step: SequenceStep, sums: tuple[int, ...]) -> None:
        if step.start == 0:
            self._sums, self._num_summed = sums, step.num_tokens
        elif step.start == self._num_summed:
            self._sums = tuple(map(int.__add__, self._sums, sums))
            self._num_summed += step.num_tokens
