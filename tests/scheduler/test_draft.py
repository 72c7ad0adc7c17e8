"""The draft of a step: its budget is what its sequences leave, whoever comes and goes."""

from __future__ import annotations

import pytest

from loraplex_scheduler.draft import StepDraft
from tests.support.sequences import SequenceFactory


@pytest.fixture
def put():
    """Return a function that makes a waiting sequence and puts all its tokens into a draft."""
    make = SequenceFactory()

    def put(draft, num_tokens):
        sequence = make(num_prompt=num_tokens)
        draft.put(sequence, sequence.step(num_tokens))
        return sequence

    return put


def test_who_is_dropped_gives_its_tokens_back(put):
    draft = StepDraft(10)
    put(draft, 1)
    dropped = put(draft, 6)
    assert draft.budget == 3
    draft.drop(dropped)
    assert (draft.budget, len(draft)) == (9, 1)
    draft.drop(dropped)
    assert draft.budget == 9
    put(draft, 9)
    assert draft.budget == 0


def test_more_than_the_budget_and_a_second_span_are_refused(put):
    draft = StepDraft(4)
    sequence = put(draft, 2)
    with pytest.raises(AssertionError, match="no room"):
        put(draft, 3)
    for num_tokens in (1, 2):
        with pytest.raises(AssertionError, match="one span"):
            draft.put(sequence, sequence.step(num_tokens))


def test_single_tokens_come_first_and_otherwise_the_order_stays(put):
    draft = StepDraft(20)
    a, b, c, d = (put(draft, num_tokens) for num_tokens in (4, 1, 3, 1))
    flight = draft.flight((), ())
    assert flight.sequences == (b, d, a, c)
    assert [step.request_id for step in flight.plan.sequences] == [
        sequence.request_id for sequence in flight.sequences
    ]


def test_a_flight_knows_what_its_step_costs(put):
    draft = StepDraft(20)
    put(draft, 4)
    put(draft, 1)
    load = draft.flight((), ()).load
    assert (load.num_tokens, load.num_sequences, load.kv_tokens) == (5, 2, 5)
