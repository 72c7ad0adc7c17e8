"""Promises of first tokens: refused when they cannot be kept, kept when they are made."""

from __future__ import annotations

import pytest

from loraplex_scheduler.answer_lengths import AnswerLengths
from loraplex_scheduler.overload import KeepPromises, NoOverloadControl
from loraplex_scheduler.policies import PolicyChoice
from loraplex_scheduler.step_times import StepLoad
from tests.support.sequences import SequenceFactory
from tests.support.timed_machine import LinearTimes, TimedMachine

SLO_S = 2.0


def machine(*, overload="promises", order="fcfs", ttft_slo_s=None, **sizes):
    choice = PolicyChoice(
        order=order, has_prefix_cache=False, overload=overload, ttft_slo_s=ttft_slo_s
    )
    return TimedMachine(choice=choice, **sizes)


def flood(machine, per_s, for_s, slo_s=SLO_S):
    """Let requests arrive evenly; return by when each was promised its first token."""
    promises, start_s, num = {}, machine.now, 0
    while machine.now < start_s + for_s:
        while num < (machine.now - start_s) * per_s:
            num += 1
            by_s = machine.now + slo_s
            promises[machine.add(first_token_by_s=by_s)] = by_s
        machine.step()
    machine.run_until(machine.now + 10)
    return promises


def num_kept(machine, promises):
    return sum(machine.first_tokens.get(name, 1e9) <= by_s for name, by_s in promises.items())


def num_accepted(machine, promises):
    """Return how many were neither refused on arrival nor gave way to shorter ones."""
    arrivals = {name: by_s - SLO_S for name, by_s in promises.items()}
    num_refused = sum(
        at_s == pytest.approx(arrivals[name]) or "gave way" in event.message
        for name, (event, at_s) in machine.rejected.items()
        if name in arrivals
    )
    return len(promises) - num_refused


def test_who_was_promised_nothing_is_never_turned_away():
    crowded = machine()
    for _ in range(300):
        crowded.add()
    crowded.run_until(60)
    assert not crowded.rejected


def test_an_idle_machine_makes_and_keeps_a_promise():
    idle = machine()
    name = idle.add(first_token_by_s=0.1)
    idle.run_until(1)
    assert idle.first_tokens[name] <= 0.1


def test_a_promise_that_cannot_be_kept_is_refused_on_arrival():
    crowded = machine()
    for _ in range(100):
        crowded.add()
    name = crowded.add(first_token_by_s=SLO_S)
    event, rejected_at = crowded.rejected[name]
    assert rejected_at == 0.0
    assert "first token" in event.message
    assert f"asked for in {SLO_S:.2f} s" in event.message
    assert event.retry_after_s > 0


def test_who_comes_again_when_told_to_is_served_in_time():
    crowded = machine()
    for _ in range(100):
        crowded.add()
    event, _ = crowded.rejected[crowded.add(first_token_by_s=SLO_S)]
    crowded.run_until(event.retry_after_s * 1.05)
    promised_s = crowded.now + SLO_S
    again = crowded.add(first_token_by_s=promised_s)
    assert again not in crowded.rejected
    crowded.run_until(promised_s + 1)
    assert crowded.first_tokens[again] <= promised_s * 1.02


def test_a_general_promise_holds_for_all_who_ask_for_nothing_else():
    crowded = machine(ttft_slo_s=SLO_S)
    for _ in range(100):
        crowded.add()
    assert crowded.rejected
    assert crowded.add(first_token_by_s=100.0) not in crowded.rejected


def test_under_overload_what_is_accepted_is_served_in_time():
    overloaded = machine()
    promises = flood(overloaded, per_s=60, for_s=30)
    kept = num_kept(overloaded, promises)
    accepted = num_accepted(overloaded, promises)
    assert accepted < 0.75 * len(promises)
    assert kept >= 0.9 * accepted


def test_under_overload_as_many_are_served_in_time_as_the_machine_can_serve():
    capacity = len(flood_without_promises(machine(overload="none")))
    overloaded, uncontrolled = machine(), machine(overload="none")
    kept = num_kept(overloaded, flood(overloaded, per_s=60, for_s=30))
    kept_without = num_kept(uncontrolled, flood(uncontrolled, per_s=60, for_s=30))
    assert kept >= 0.85 * capacity
    assert kept_without < 0.5 * kept


def flood_without_promises(machine):
    """Return whose first token came while the machine was full for 30 seconds."""
    for _ in range(2000):
        machine.add()
    machine.run_until(30)
    return machine.first_tokens


@pytest.mark.parametrize("scale", [0.5, 0.3])
def test_promises_come_true_although_the_model_is_too_optimistic(scale):
    wrong = machine(believed=LinearTimes(scale))
    flood(wrong, per_s=60, for_s=30)
    wrong.rejected.clear()
    promises = flood(wrong, per_s=60, for_s=30)
    assert num_kept(wrong, promises) >= 0.9 * num_accepted(wrong, promises)
    assert wrong.policies.overload.correction > 0.6 / scale


def test_a_machine_that_is_faster_than_believed_is_filled_after_a_while():
    slow, right = machine(believed=LinearTimes(1.6)), machine()
    flood(slow, per_s=60, for_s=60)
    kept = [num_kept(m, flood(m, per_s=60, for_s=20)) for m in (slow, right)]
    assert kept[0] >= 0.85 * kept[1]
    assert slow.policies.overload.correction < 1


@pytest.mark.parametrize("order", ["fcfs", "vtc", "lcfs", "edf"])
def test_nobody_gets_a_first_token_long_after_it_was_promised(order):
    overloaded = machine(order=order)
    promises = flood(overloaded, per_s=60, for_s=20)
    late = {
        name: overloaded.first_tokens[name] - by_s
        for name, by_s in promises.items()
        if name in overloaded.first_tokens
    }
    assert max(late.values()) < 0.2


def test_who_is_overtaken_until_it_is_too_late_is_dropped_at_once():
    overtaken = machine()
    for _ in range(16):
        overtaken.add()
    name = overtaken.add(first_token_by_s=SLO_S)
    assert name not in overtaken.rejected
    for _ in range(200):
        overtaken.add(priority=-1)
    overtaken.run_until(SLO_S + 1)
    event, dropped_at = overtaken.rejected[name]
    assert SLO_S - 0.1 < dropped_at <= SLO_S + 0.1
    assert event.retry_after_s >= 0.1
    assert name not in overtaken.first_tokens


def test_who_got_its_first_token_is_never_dropped():
    served = machine(answer_len=200)
    name = served.add(first_token_by_s=0.1)
    served.run_until(10)
    assert name in served.first_tokens
    assert name not in served.rejected


def test_who_went_away_is_not_dropped():
    left = machine()
    for _ in range(16):
        left.add()
    name = left.add(first_token_by_s=SLO_S)
    left.scheduler.abort(name)
    for _ in range(200):
        left.add(priority=-1)
    left.run_until(SLO_S + 1)
    assert name not in left.rejected


def test_who_ended_long_before_its_promise_is_forgotten():
    """A promise may be hours away; those who got their first token at once are not kept so long."""
    patient = machine(max_running=64)
    for _ in range(300):
        patient.add(first_token_by_s=patient.now + 7200.0)
        patient.step()
    patient.run_until(patient.now + 60)
    patient.add(first_token_by_s=patient.now + 7200.0)
    assert len(patient.first_tokens) >= 300
    assert len(patient.policies.overload._starts) < 100


def test_a_promise_is_kept_that_only_the_prefix_cache_makes_possible():
    choice = PolicyChoice(order="fcfs")
    cached = TimedMachine(choice=choice, max_step_tokens=512)
    prompt = tuple(range(1, 401))
    cached.add(prompt=prompt)
    cached.run_until(10)
    alone_s = cached.times.step_s(StepLoad(400, 1, 400, 0))
    by_s = cached.now + alone_s / 2
    name = cached.add(prompt=prompt, first_token_by_s=by_s)
    cached.run_until(20)
    assert not cached.rejected
    assert cached.first_tokens[name] <= by_s


def test_a_deadline_that_waiting_would_break_is_refused():
    crowded = machine(answer_len=40)
    alone_s = 40 * 0.011
    assert crowded.add(deadline_s=3 * alone_s) not in crowded.rejected
    for _ in range(60):
        crowded.add()
    event, _ = crowded.rejected[crowded.add(deadline_s=3 * alone_s)]
    assert "last token" in event.message
    assert crowded.add(deadline_s=100.0) not in crowded.rejected


def test_a_deadline_too_near_for_the_usual_answer_is_no_matter_of_overload():
    idle = machine(answer_len=200)
    assert idle.add(deadline_s=0.5) not in idle.rejected


def test_looking_for_who_is_late_looks_at_nobody_when_nobody_is():
    make, policy = SequenceFactory(), KeepPromises(LinearTimes(), AnswerLengths())
    nobody = machine()
    for i in range(100):
        newcomer = make(first_token_by_s=100.0 + i)
        assert policy.refuse(newcomer, nobody.scheduler, 0.0) is None
    untouchable = None
    assert policy.drop(untouchable, 50.0) == []


def test_without_overload_control_nobody_is_turned_away():
    make, policy = SequenceFactory(), NoOverloadControl()
    crowded = machine()
    assert policy.refuse(make(first_token_by_s=0.0), crowded.scheduler, 10.0) is None
    assert policy.drop(crowded.scheduler, 10.0) == []
