"""Expected lengths of answers: by adapter, by what there is already, and never beyond the limit."""

from __future__ import annotations

import random

import pytest

from loraplex_scheduler.answer_lengths import AnswerLengths
from tests.support.sequences import SequenceFactory, answer


def answered(make, length, adapter=None):
    return answer(make(num_prompt=2, max_tokens=100_000, adapter=adapter), length)


def learned(make, lengths, adapter=None):
    learner = AnswerLengths()
    for length in lengths:
        learner.observe(answered(make, length, adapter))
    return learner


def test_the_mean_of_an_adapter_is_learned():
    make = SequenceFactory()
    learner = learned(make, [300, 500] * 100, "a")
    assert learner.mean("a") == pytest.approx(400, rel=0.1)


def test_an_unknown_adapter_gets_the_mean_over_all():
    make = SequenceFactory()
    learner = AnswerLengths()
    for _ in range(200):
        learner.observe(answered(make, 100, "short"))
        learner.observe(answered(make, 500, "long"))
    assert learner.mean("new") == pytest.approx(300, rel=0.1)
    assert learner.mean("short") < 150 < 450 < learner.mean("long")


def test_one_answer_says_little_of_an_adapter():
    make = SequenceFactory()
    learner = learned(make, [100] * 300)
    learner.observe(answered(make, 2000, "new"))
    assert learner.mean("new") < 600


def test_answers_of_equal_length_leave_the_difference():
    make = SequenceFactory()
    learner = learned(make, [200] * 1000)
    rests = [learner.rest(answered(make, num)) for num in (1, 100, 180)]
    assert rests == [
        pytest.approx(199, abs=60),
        pytest.approx(100, abs=60),
        pytest.approx(20, abs=60),
    ]
    assert rests[0] > rests[1] > rests[2]


def test_answers_without_memory_leave_the_mean_at_any_time():
    make, rng = SequenceFactory(), random.Random(0)
    learner = learned(make, [1 + int(rng.expovariate(1 / 200)) for _ in range(2000)])
    for num in (1, 200, 500):
        assert learner.rest(answered(make, num)) == pytest.approx(200, rel=0.4)


def test_who_outlives_what_was_expected_is_not_expected_to_end_at_once():
    make, rng = SequenceFactory(), random.Random(0)
    lengths = [min(2000, int(rng.lognormvariate(5, 1))) + 1 for _ in range(1000)]
    learner = learned(make, lengths)
    mean = learner.mean(None)
    assert learner.rest(answered(make, int(2 * mean))) > 0.5 * mean


def test_nobody_is_expected_to_pass_its_limit_or_to_have_ended():
    make = SequenceFactory()
    learner = learned(make, [200] * 100)
    limited = answer(make(num_prompt=2, max_tokens=10), 7)
    assert learner.rest(limited) == 3
    assert learner.rest(answer(make(num_prompt=2, max_tokens=10), 9)) == 1
    many = [limited, answered(make, 50), make(num_prompt=5, max_tokens=1)]
    assert learner.rests(many) == [learner.rest(s) for s in many]


def test_lengths_follow_a_change():
    make = SequenceFactory()
    learner = learned(make, [50] * 500 + [400] * 200, "a")
    assert learner.mean("a") == pytest.approx(400, rel=0.1)
