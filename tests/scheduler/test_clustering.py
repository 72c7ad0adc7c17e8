"""When one more distinct adapter is worth reading in every step."""

from __future__ import annotations

from loraplex_scheduler.clustering import NoClustering, SoftClustering
from loraplex_scheduler.policies import PolicyChoice
from loraplex_scheduler.step_times import StepLoad
from tests.support.sequences import SequenceFactory, run
from tests.support.timed_machine import LinearTimes, TimedMachine

MAX_WAIT_S = 5.0
NOW = 100.0


class AdapterBound(LinearTimes):
    """Reading adapters takes `page_s` a page beside 10 ms a step."""

    def __init__(self, page_s):
        super().__init__()
        self.page_s = page_s

    def step_s(self, load: StepLoad) -> float:
        return 0.01 + self.page_s * load.adapter_pages


def may_join(newcomer, running, page_s, now=NOW):
    policy = SoftClustering(AdapterBound(page_s), MAX_WAIT_S)
    policy.begin(running, now)
    return policy.may_join(newcomer)


def batch(make, num, adapter="a"):
    return [run(make(adapter=adapter, arrival_s=NOW - 10), 1) for _ in range(num)]


def test_a_cheap_adapter_joins_and_a_dear_one_waits():
    make = SequenceFactory()
    running, newcomer = batch(make, 10), make(adapter="b", arrival_s=NOW)
    pages = newcomer.num_adapter_pages
    before_s = 0.01
    # With 10 running, a newcomer may lengthen the step by a tenth.
    assert may_join(newcomer, running, 0.05 * before_s / pages)
    assert not may_join(newcomer, running, 0.15 * before_s / pages)


def test_the_more_run_the_less_a_newcomer_is_worth():
    make = SequenceFactory()
    newcomer = make(adapter="b", arrival_s=NOW)
    page_s = 0.1 * 0.01 / newcomer.num_adapter_pages
    assert may_join(newcomer, batch(make, 4), page_s)
    assert not may_join(newcomer, batch(make, 40), page_s)


def test_whoever_shares_an_adapter_or_needs_none_may_join():
    make = SequenceFactory()
    running = batch(make, 10)
    assert may_join(make(adapter="a", arrival_s=NOW), running, 1.0)
    assert may_join(make(arrival_s=NOW), running, 1.0)


def test_nobody_waits_beside_an_idle_machine_or_for_too_long():
    make = SequenceFactory()
    dear = make(adapter="b", arrival_s=NOW)
    assert may_join(dear, [], 1.0)
    assert not may_join(dear, batch(make, 10), 1.0, now=NOW + MAX_WAIT_S - 0.1)
    assert may_join(dear, batch(make, 10), 1.0, now=NOW + MAX_WAIT_S + 0.1)


def test_who_was_admitted_in_this_step_is_company():
    make = SequenceFactory()
    policy = SoftClustering(AdapterBound(1.0), MAX_WAIT_S)
    policy.begin(batch(make, 10), NOW + MAX_WAIT_S)
    patient, follower = make(adapter="b", arrival_s=NOW - 1), make(adapter="b", arrival_s=NOW + 1)
    assert not policy.may_join(follower)
    assert policy.may_join(patient)
    policy.admitted(patient)
    assert policy.may_join(follower)


def test_each_step_looks_anew_at_who_runs():
    make = SequenceFactory()
    policy, newcomer = (
        SoftClustering(AdapterBound(1.0), MAX_WAIT_S),
        make(adapter="b", arrival_s=NOW),
    )
    policy.begin(batch(make, 10), NOW)
    assert not policy.may_join(newcomer)
    policy.begin(batch(make, 10, adapter="b"), NOW)
    assert policy.may_join(newcomer)


def test_without_clustering_everybody_may_join():
    make, policy = SequenceFactory(), NoClustering()
    policy.begin(batch(make, 10), NOW)
    assert policy.may_join(make(adapter="b"))


def test_a_lonely_adapter_is_served_although_company_never_comes():
    choice = PolicyChoice(order="fcfs", cluster_wait_s=2.0, has_prefix_cache=False)
    machine = TimedMachine(choice=choice, believed=AdapterBound(1.0))
    start_s = None
    for i in range(400):
        machine.add(adapter="popular")
        if i == 20:
            start_s, lonely = machine.now, machine.add(adapter="lonely")
        machine.step()
    machine.run_until(machine.now + 30)
    waited_s = machine.first_tokens[lonely] - start_s
    assert 1.9 < waited_s < 8.0
