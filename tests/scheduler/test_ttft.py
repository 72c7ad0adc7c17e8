"""Predicted first tokens, against a scheduler that is driven until they come."""

from __future__ import annotations

import pytest

from loraplex_scheduler.step_times import StepLoad
from loraplex_scheduler.ttft import predict
from tests.support.scheduling import make_manifest, make_request
from tests.support.timed_machine import TimedMachine


def predicted(machine, adapter=None):
    """Return the predicted seconds to the first token of a prompt of 40."""
    request = make_request(
        "new",
        num_prompt=40,
        max_tokens=500,
        arrival_s=machine.now,
        adapter=make_manifest(adapter) if adapter else None,
    )
    newcomer = machine.make.of(request, order=10**6)
    forecast = predict(newcomer, machine.scheduler, machine.times, machine.policies.lengths)
    return forecast.first_token_s


def test_an_idle_machine_answers_after_one_step():
    machine = TimedMachine()
    assert predicted(machine) == pytest.approx(machine.first_token_s(), rel=0.1)


@pytest.mark.parametrize("num_waiting", [10, 60, 150])
@pytest.mark.parametrize(
    "bound",
    [
        {"max_running": 16},  # places
        {"max_running": 100, "num_pages": 300},  # pages
        {"max_running": 100, "max_step_tokens": 112, "answer_len": 4},  # the steps' budget
    ],
    ids=["places", "pages", "budget"],
)
def test_a_queue_moves_as_foreseen(bound, num_waiting):
    ratios = []
    for seed in range(3):
        machine = TimedMachine(**bound, seed=seed)
        for _ in range(40):
            machine.add()
        for _ in range(60):  # a mix of old and new ones runs
            machine.step()
        while machine.scheduler.num_waiting < num_waiting:
            machine.add()
        foreseen_s = predicted(machine)
        ratios.append(machine.first_token_s() / foreseen_s)
    assert sorted(ratios)[1] == pytest.approx(1.0, abs=0.35)


def test_a_long_queue_is_extrapolated_from_its_beginning():
    machine = TimedMachine()
    for _ in range(800):
        machine.add()
    foreseen_s = predicted(machine)
    assert machine.first_token_s() == pytest.approx(foreseen_s, rel=0.25)


def test_an_adapter_that_is_away_is_waited_for():
    machine = TimedMachine()
    assert predicted(machine, "a") == pytest.approx(machine.first_token_s(adapter="a"), rel=0.2)
    resident = predicted(machine, "a")
    assert resident < predicted(machine, "b") - 0.03


def test_loads_ahead_delay_the_load_behind():
    machine = TimedMachine()
    for i in range(8):
        machine.add(adapter=f"other{i}")
    assert predicted(machine, "a") == pytest.approx(machine.first_token_s(adapter="a"), rel=0.3)


def test_who_is_urgent_does_not_wait_for_the_queue():
    machine = TimedMachine()
    for _ in range(200):
        machine.add()
    urgent = machine.make.of(make_request("urgent", num_prompt=40, priority=-1), order=10**6)
    forecast = predict(urgent, machine.scheduler, machine.times, machine.policies.lengths)
    assert forecast.first_token_s < predicted(machine) / 20


def test_an_answer_takes_as_many_steps_as_it_is_long():
    machine = TimedMachine(answer_len=40)
    newcomer = machine.make(num_prompt=10, max_tokens=500)
    forecast = predict(newcomer, machine.scheduler, machine.times, machine.policies.lengths)
    step_s = machine.times.step_s(StepLoad(1, 1, 10, 0))
    assert forecast.answer_s == pytest.approx(40 * step_s, rel=0.2)
