"""The draft of a step: its budget is what its sequences leave, whoever comes and goes."""

from __future__ import annotations

import pytest

from loraplex_scheduler.draft import StepDraft
from loraplex_scheduler.plan import SequenceStep
from loraplex_scheduler.sampling import SamplingParams


def make_step(request_id: str, num_tokens: int) -> SequenceStep:
    return SequenceStep(
        request_id=request_id,
        adapter_id=None,
        start=0,
        token_ids=(1,) * num_tokens,
        block_table=(0,),
        is_sampled=True,
        sampling=SamplingParams(),
        history=(),
        num_prompt=num_tokens,
        position=num_tokens,
        banned_token_ids=frozenset(),
    )


def test_who_is_dropped_gives_its_tokens_back():
    draft = StepDraft(10)
    for name, num_tokens in (("a", 1), ("b", 6)):
        draft.put(make_step(name, num_tokens))
    assert draft.budget == 3
    draft.drop("b")
    assert draft.budget == 9
    draft.drop("b")
    draft.drop("never put in")
    assert draft.budget == 9
    draft.put(make_step("b", 9))
    assert draft.budget == 0


def test_more_than_the_budget_and_a_second_span_are_refused():
    draft = StepDraft(4)
    draft.put(make_step("a", 2))
    with pytest.raises(AssertionError, match="no room"):
        draft.put(make_step("b", 3))
    with pytest.raises(AssertionError, match="one span"):
        draft.put(make_step("a", 1))


def test_single_tokens_come_first_and_otherwise_the_order_stays():
    draft = StepDraft(20)
    for name, num_tokens in (("a", 4), ("b", 1), ("c", 3), ("d", 1)):
        draft.put(make_step(name, num_tokens))
    assert [step.request_id for step in draft.in_order()] == ["b", "d", "a", "c"]
