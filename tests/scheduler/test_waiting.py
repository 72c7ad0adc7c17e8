"""Orders of service by a fixed key: who is next, and that nobody waits forever."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from loraplex_scheduler.vtc import FairQueue
from loraplex_scheduler.waiting import (
    PATIENCE_S,
    OrderedQueue,
    arrival_key,
    deadline_key,
    latest_key,
)
from tests.support.sequences import SequenceFactory


def fcfs():
    return OrderedQueue(arrival_key)


def lcfs(oldest_every=4):
    return OrderedQueue(latest_key, oldest_every=oldest_every)


def edf():
    return OrderedQueue(deadline_key)


def serve(queue):
    """Admit whoever is first, as a step does that has room for one."""
    sequence = next(queue.in_order())
    queue.remove(sequence)
    queue.charge_prompt(sequence, sequence.num_tokens)
    return sequence


def push_all(queue, sequences):
    for sequence in sequences:
        queue.push(sequence)


def test_first_come_is_first_served_whatever_the_order_of_the_calls():
    make = SequenceFactory()
    sequences = [make() for _ in range(6)]
    queue = fcfs()
    push_all(queue, random.Random(3).sample(sequences, 6))
    assert [serve(queue) for _ in range(6)] == sequences
    assert len(queue) == 0


@pytest.mark.parametrize("order", [fcfs, lcfs, lambda: FairQueue(lambda s: s.request.tenant)])
def test_who_waits_is_told_without_a_look_at_all_of_them(order, monkeypatch):
    make, queue = SequenceFactory(), order()
    first, second = make(), make()
    push_all(queue, (first, second))
    queue.remove(first)
    monkeypatch.delattr(type(queue), "__iter__")
    assert second in queue
    assert first not in queue


def test_equal_arrivals_are_served_as_they_were_added():
    make = SequenceFactory()
    sequences = [make(arrival_s=1.0) for _ in range(3)]
    queue = fcfs()
    push_all(queue, reversed(sequences))
    assert list(queue.in_order()) == sequences


@pytest.mark.parametrize("order", [fcfs, lcfs, edf])
def test_a_lower_priority_number_goes_first_in_every_order(order):
    make = SequenceFactory()
    later, first = [make(priority=1) for _ in range(3)], [make(priority=-1) for _ in range(3)]
    queue = order()
    push_all(queue, later + first)
    assert {serve(queue) for _ in range(3)} == set(first)


def test_a_preempted_sequence_returns_to_its_old_place():
    make = SequenceFactory()
    old, middle, new = make(), make(), make()
    queue = fcfs()
    push_all(queue, (old, middle, new))
    assert serve(queue) is old
    assert serve(queue) is middle
    queue.push(middle)
    queue.push(old)
    assert list(queue.in_order()) == [old, middle, new]


@pytest.mark.parametrize("order", [fcfs, lcfs, edf])
def test_a_walk_that_admits_some_and_passes_others_yields_each_once(order):
    make = SequenceFactory()
    sequences = [make() for _ in range(40)]
    queue = order()
    push_all(queue, sequences)
    rng, seen, admitted = random.Random(1), [], []
    for sequence in queue.in_order():
        seen.append(sequence)
        if rng.random() < 0.5:
            queue.remove(sequence)
            queue.charge_prompt(sequence, 4)
            admitted.append(sequence)
    assert sorted(s.order for s in seen) == list(range(40))
    assert set(queue) == set(sequences) - set(admitted)


def test_last_come_is_first_served_but_for_the_oldest_now_and_then():
    make = SequenceFactory()
    sequences = [make() for _ in range(9)]
    queue = lcfs(oldest_every=4)
    push_all(queue, sequences)
    assert [serve(queue).order for _ in range(9)] == [8, 7, 6, 0, 5, 4, 3, 1, 2]


def test_last_come_first_served_starves_nobody_while_newcomers_keep_coming():
    make = SequenceFactory()
    queue = lcfs(oldest_every=4)
    backlog = {make() for _ in range(10)}
    push_all(queue, backlog)
    for _ in range(4 * 10):
        queue.push(make())
        backlog.discard(serve(queue))
    assert not backlog


def test_the_oldest_stays_due_until_there_is_room_for_it():
    make = SequenceFactory()
    oldest, *others = [make() for _ in range(6)]
    queue = lcfs(oldest_every=3)
    push_all(queue, (oldest, *others))
    serve(queue)
    serve(queue)
    for _ in range(3):  # steps that find no pages for it
        assert next(queue.in_order()) is oldest
    assert serve(queue) is oldest
    assert serve(queue) is others[2]


def test_the_earliest_deadline_is_served_first():
    make = SequenceFactory()
    whole = make(arrival_s=0.0, deadline_s=20.0)
    token = make(arrival_s=1.0, first_token_by_s=5.0, deadline_s=90.0)
    soon = make(arrival_s=2.0, deadline_s=8.0)
    queue = edf()
    push_all(queue, (whole, token, soon))
    assert list(queue.in_order()) == [token, soon, whole]


@pytest.mark.parametrize("deadline_s", [None, 1e9])
def test_without_a_near_deadline_patience_ends_after_a_while(deadline_s):
    make = SequenceFactory()
    patient = make(arrival_s=0.0, deadline_s=deadline_s)
    queue = edf()
    queue.push(patient)
    served_at = None
    for i in range(200):  # one request a second, each due in five, and room for one
        now = float(i)
        queue.push(make(arrival_s=now, first_token_by_s=now + 5))
        if serve(queue) is patient:
            served_at = now
            break
    assert served_at is not None
    assert PATIENCE_S - 10 < served_at <= PATIENCE_S


def test_a_promise_in_the_past_does_not_go_before_older_ones():
    make = SequenceFactory()
    first = make(arrival_s=10.0, first_token_by_s=10.5)
    impossible = make(arrival_s=11.0, first_token_by_s=-5.0)
    queue = edf()
    push_all(queue, (impossible, first))
    assert next(queue.in_order()) is first


def test_who_is_ahead_is_counted_and_listed_up_to_a_limit():
    make = SequenceFactory()
    sequences = [make() for _ in range(10)]
    queue = fcfs()
    push_all(queue, sequences)
    ahead = queue.ahead_of(make(), limit=4)
    assert (ahead.sequences, ahead.num_more) == (sequences[:4], 6)
    ahead = queue.ahead_of(sequences[3], limit=4)
    assert (ahead.sequences, ahead.num_more) == (sequences[:3], 0)
    urgent = queue.ahead_of(make(priority=-1), limit=4)
    assert (urgent.sequences, urgent.num_more) == ([], 0)


def test_a_walk_costs_what_it_yields_not_what_waits():
    make = SequenceFactory()
    keys = []
    queue = OrderedQueue(lambda s: keys.append(s) or arrival_key(s))
    push_all(queue, [make() for _ in range(2000)])
    keys.clear()
    assert len(list(islice(queue.in_order(), 5))) == 5
    assert not keys, "a walk sorted the queue again"
