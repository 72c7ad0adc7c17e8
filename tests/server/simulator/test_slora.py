"""S-LoRA's gate and its early abort, as its router has them."""

from __future__ import annotations

from loraplex_scheduler.admission import Greedy
from loraplex_scheduler.answer_lengths import AnswerLengths
from loraplex_server.simulator.slora import EarlyAbort, Gate
from tests.support.sequences import SequenceFactory


def make_gate(steps=3):
    return Gate(Greedy(AnswerLengths()), steps)


def test_newcomers_are_looked_at_every_so_many_steps():
    gate, looks = make_gate(), []
    for _ in range(9):
        looks.append(gate.may_admit(num_running=5))
        gate.launched(has_admitted=False)
    assert looks == [True, False, False, False, True, False, False, False, True]


def test_an_idle_engine_looks_at_once():
    gate = make_gate()
    gate.may_admit(num_running=5)
    gate.launched(has_admitted=True)
    assert not gate.may_admit(num_running=5)
    assert gate.may_admit(num_running=0)


def test_after_a_load_that_was_needed_newcomers_come_at_once():
    gate = make_gate()
    gate.may_admit(num_running=5)
    gate.launched(has_admitted=False)
    gate.loaded()
    assert gate.may_admit(num_running=5)


def test_only_adapters_that_a_look_at_the_queue_came_to_are_needed():
    gate = make_gate()
    gate.may_admit(num_running=5)
    gate.admission.begin([])
    gate.admission.is_enough(1, SequenceFactory()(adapter="a"))
    assert gate.is_needed("a")
    assert not gate.is_needed("b")
    gate.launched(has_admitted=False)
    gate.may_admit(num_running=5)
    assert not gate.is_needed("a"), "the gate is closed: nothing was looked at"


def arrive(queue, *arrivals):
    make = SequenceFactory()
    sequences = [make(arrival_s=float(at)) for at in arrivals]
    for sequence in sequences:
        queue.push(sequence)
    return sequences


def test_the_newest_go_first_while_the_queue_outgrows_its_service():
    queue = EarlyAbort(slo_s=6.0)
    arrive(queue, *range(8))
    first, *_ = queue.in_order()
    assert first.request.arrival_s == 7
    for _ in range(6):  # nobody comes any more
        order = list(queue.in_order())
    assert order[0].request.arrival_s == 0


def test_who_would_be_late_is_dropped_half_a_second_before():
    queue = EarlyAbort(slo_s=6.0)
    old, _ = arrive(queue, 0.0, 1.0)
    assert not queue.drop(None, now=5.4)
    assert [sequence for sequence, _ in queue.drop(None, now=5.6)] == [old]


def test_who_has_an_answer_begun_is_not_dropped():
    queue = EarlyAbort(slo_s=6.0)
    (old,) = arrive(queue, 0.0)
    old.num_tokens += 1
    assert not queue.drop(None, now=9.0)
