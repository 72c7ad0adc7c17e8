"""The step that is being decided: who computes how many tokens, and how many may still be given."""

from __future__ import annotations

from loraplex_scheduler.plan import SequenceStep


class StepDraft:
    """Lives for one `Scheduler.schedule`.

    The budget is kept and not summed up: with hundreds of decodes, that sum for each of them would
    cost more than all the rest of the decision.

    Attributes:
        budget: tokens that the step has room for, beside those of its sequences.
    """

    def __init__(self, max_step_tokens: int) -> None:
        self.budget = max_step_tokens
        self._steps: dict[str, SequenceStep] = {}

    def put(self, step: SequenceStep) -> None:
        """Let a sequence compute; it is not in the draft yet."""
        assert step.request_id not in self._steps, "one span per sequence"
        assert step.num_tokens <= self.budget, "the step has no room for so many tokens"
        self._steps[step.request_id] = step
        self.budget -= step.num_tokens

    def drop(self, request_id: str) -> None:
        """Take a sequence out, if it is in."""
        step = self._steps.pop(request_id, None)
        if step is not None:
            self.budget += step.num_tokens

    def in_order(self) -> list[SequenceStep]:
        """Return the spans of one token, then the longer ones (see `Plan`)."""
        return sorted(self._steps.values(), key=lambda step: step.num_tokens != 1)
