"""The step that is being decided: who computes how many tokens, and how many may still be given."""

from __future__ import annotations

from collections.abc import Iterable

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.flights import Flight
from loraplex_scheduler.plan import AdapterLoad, Plan, PlannedAdapter, SequenceStep
from loraplex_scheduler.sequence import Sequence
from loraplex_scheduler.step_times import StepLoad


class StepDraft:
    """Lives for one `Scheduler.schedule`.

    The budget is kept and not summed up: with hundreds of decodes, that sum for each of them would
    cost more than all the rest of the decision.

    Attributes:
        budget: tokens that the step has room for, beside those of its sequences.
    """

    def __init__(self, max_step_tokens: int) -> None:
        self.budget = self._max_step_tokens = max_step_tokens
        # Spans of one token come first in a plan (see `Plan`).
        self._single: dict[Sequence, SequenceStep] = {}
        self._longer: dict[Sequence, SequenceStep] = {}

    def __len__(self) -> int:
        return len(self._single) + len(self._longer)

    def put(self, sequence: Sequence, step: SequenceStep) -> None:
        """Let a sequence compute; it is not in the draft yet."""
        assert step.num_tokens <= self.budget, "the step has no room for so many tokens"
        assert sequence not in self._single, "one span per sequence"
        assert sequence not in self._longer, "one span per sequence"
        steps = self._single if step.num_tokens == 1 else self._longer
        steps[sequence] = step
        self.budget -= step.num_tokens

    def put_decodes(self, sequences: Iterable[Sequence]) -> None:
        """Let each of these compute its one pending token; none of them is in the draft yet."""
        num_before = len(self._single)
        self._single |= {sequence: sequence.step(1) for sequence in sequences}
        self.budget -= len(self._single) - num_before
        assert self.budget >= 0, "the step has no room for so many decodes"

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out, if it is in."""
        step = self._single.pop(sequence, None) or self._longer.pop(sequence, None)
        if step is not None:
            self.budget += step.num_tokens

    def longer(self) -> list[tuple[Sequence, SequenceStep]]:
        """Return the spans of more than one token."""
        return list(self._longer.items())

    def flight(self, loads: Iterable[AdapterLoad], prefetches: Iterable[AdapterManifest]) -> Flight:
        """Return the decision as a plan, with whose it is and what it costs."""
        sequences = *self._single, *self._longer
        steps = *self._single.values(), *self._longer.values()
        adapters: dict[str, PlannedAdapter] = {}
        for sequence in sequences:
            adapters |= sequence.planned
        num_tokens = self._max_step_tokens - self.budget
        load = StepLoad(
            num_tokens,
            len(steps),
            kv_tokens=num_tokens + sum([step.start for step in steps]),
            adapter_pages=sum([planned.layout.num_pages for planned in adapters.values()]),
        )
        return Flight(Plan(steps, tuple(loads), adapters, tuple(prefetches)), sequences, load)
