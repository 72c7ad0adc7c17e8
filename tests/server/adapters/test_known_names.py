"""What is known of names, by a clock that is told."""

from __future__ import annotations

import pytest

from loraplex_server.adapters.known_names import STALE_S, KnownNames
from loraplex_server.adapters.references import AdapterReference

A = AdapterReference("a")
ROW = object()


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def known(clock) -> KnownNames:
    known = KnownNames(is_shared=True, outage_s=60, clock=clock)
    known.note_reading(clock())
    assert known.learn(known.ask(A), ROW)
    return known


def test_an_answer_counts_while_no_change_can_have_been_missed(known, clock):
    assert known.get(A).row is ROW
    clock.now_s += STALE_S
    assert known.get(A).row is ROW
    clock.now_s += 0.01
    assert known.get(A) is None
    known.note_reading(clock() - 0.5)
    assert known.get(A).row is ROW


def test_without_any_reading_of_changes_nothing_counts(clock):
    known = KnownNames(is_shared=True, outage_s=60, clock=clock)
    known.learn(known.ask(A), ROW)
    assert known.get(A) is None
    assert known.get_in_need(A) is None


def test_a_registry_of_ones_own_has_no_changes_to_miss(clock):
    known = KnownNames(is_shared=False, clock=clock)
    known.learn(known.ask(A), ROW)
    clock.now_s += 1e6
    assert known.get(A).row is ROW


def test_an_answer_is_asked_for_again_now_and_then(known, clock):
    clock.now_s += 11
    known.note_reading(clock())
    assert known.get(A) is None


def test_while_one_asks_again_nobody_else_waits_for_the_answer(known, clock):
    clock.now_s += 11
    known.note_reading(clock())
    ticket = known.ask(A)
    assert known.get(A).row is ROW
    clock.now_s += 60
    known.note_reading(clock())
    assert known.get(A) is None, "a server of an earlier release writes no changes"
    clock.now_s -= 30
    known.give_up(ticket)
    assert known.get(A) is None


def test_in_an_outage_what_is_known_counts_for_a_while(known, clock):
    clock.now_s += 30
    assert known.get(A) is None
    assert known.get_in_need(A).row is ROW
    known.note_failure()
    assert known.get(A).row is ROW
    clock.now_s += 31
    assert known.get(A) is None
    assert known.get_in_need(A) is None


def test_while_a_registry_is_silent_nobody_asks_it_for_what_is_known(known, clock):
    clock.now_s += 0.5  # of the last reading, when it was known that nothing had changed
    known.begin_reading(clock())
    for _ in range(20):
        clock.now_s += 0.1
        assert known.get(A).row is ROW
    clock.now_s += 60
    assert known.get(A) is None
    known.note_failure()
    known.begin_reading(clock())
    known.note_reading(clock())
    clock.now_s += STALE_S + 0.01
    assert known.get(A) is None, "it has answered, so nothing is silent"


def test_after_an_outage_the_bound_is_the_usual_one(known, clock):
    clock.now_s += 30
    known.note_failure()
    known.note_reading(clock())
    known.learn(known.ask(A), ROW)
    clock.now_s += STALE_S + 0.01
    assert known.get(A) is None


def test_an_answer_to_a_question_before_a_change_does_not_count(known):
    version = AdapterReference("a", "sha256:0123456789ab")
    others = known.ask(AdapterReference("b"))
    for forget in (lambda: known.forget("a"), known.forget_all):
        tickets = [known.ask(A), known.ask(version)]
        forget()
        assert [known.learn(ticket, ROW) for ticket in tickets] == [False, False]
        assert known.get(A) is None
    assert not known.learn(others, ROW)


def test_a_change_of_one_name_leaves_the_others(known):
    ticket = known.ask(AdapterReference("b"))
    known.forget("b2")
    assert known.learn(ticket, None)
    assert known.get(A).row is ROW
    assert known.get(AdapterReference("b")).row is None


def test_only_so_much_is_kept(known):
    for index in range(20_000):
        known.learn(known.ask(AdapterReference(f"n{index}")), ROW)
        known.get(A)
    assert known.get(AdapterReference("n0")) is None
    assert known.get(AdapterReference("n19999")).row is ROW
    assert known.get(A).row is ROW  # it was used all the time
    versions = [AdapterReference("a", f"sha256:{index:064x}") for index in range(100)]
    for version in versions:
        known.learn(known.ask(version), ROW)
    assert [version for version in versions if known.get(version)] == versions[-8:]
    assert known.get(A).row is ROW


def test_names_that_do_not_exist_push_out_none_that_do(known):
    shared = AdapterReference("tenant/a")
    known.learn(known.ask(shared), None)
    for index in range(20_000):
        known.learn(known.ask(AdapterReference(f"n{index}")), None)
        known.learn(known.ask(AdapterReference("a", f"sha256:{index:064x}")), None)
        assert known.get(shared).row is None  # as whoever reads `a` by it does all the time
    assert known.get(A).row is ROW
    assert known.get(AdapterReference("n0")) is None, "these have a bound of their own"


def test_what_comes_into_being_and_goes_is_known_by_its_last_answer(known):
    for row in (None, ROW, None):
        known.learn(known.ask(A), row)
        assert known.get(A).row is row
    known.forget("a")
    assert known.get(A) is None
