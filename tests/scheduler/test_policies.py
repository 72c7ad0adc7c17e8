"""Choosing policies by name."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product

import pytest

from loraplex_memory.eviction import CostAware, DropUnused, LeastRecentlyUsed
from loraplex_scheduler.admission import Expected, WorstCase
from loraplex_scheduler.batching import MixedBatching, SeparatePrefill
from loraplex_scheduler.clustering import NoClustering, SoftClustering
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.overload import KeepPromises, NoOverloadControl
from loraplex_scheduler.policies import (
    ADMISSIONS,
    BATCHINGS,
    EVICTIONS,
    ORDERS,
    OVERLOADS,
    S_LORA,
    PolicyChoice,
    make_eviction,
    make_policies,
)
from loraplex_scheduler.vtc import FairQueue
from tests.support.sequences import SequenceFactory
from tests.support.timed_machine import TimedMachine

LIMITS = SchedulerLimits(max_step_tokens=64, max_running=8, max_model_len=100)


def make(choice):
    return make_policies(choice, LIMITS, page_tokens=16)


def test_the_defaults_are_fair_expect_keep_promises_and_rank_by_cost():
    policies = make(PolicyChoice())
    assert isinstance(policies.queue, FairQueue)
    assert isinstance(policies.admission, Expected)
    assert isinstance(policies.batching, MixedBatching)
    assert isinstance(policies.clustering, NoClustering)
    assert isinstance(policies.overload, KeepPromises)
    assert isinstance(make_eviction(PolicyChoice()), CostAware)


def test_s_lora_is_what_its_paper_and_code_say():
    policies = make(S_LORA)
    assert isinstance(policies.admission, WorstCase)
    assert isinstance(policies.batching, SeparatePrefill)
    assert isinstance(policies.overload, NoOverloadControl)
    assert isinstance(make_eviction(S_LORA), DropUnused)
    assert not S_LORA.has_prefix_cache


def test_waiting_for_company_is_off_unless_it_is_asked_for():
    assert isinstance(make(PolicyChoice(cluster_wait_s=0.5)).clustering, SoftClustering)
    assert type(make_eviction(PolicyChoice(eviction="lru"))) is LeastRecentlyUsed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"order": "random"}, "vtc, vtc-adapter, fcfs, lcfs, edf"),
        ({"admission": "all"}, "expected, worst-case, greedy"),
        ({"eviction": ""}, "cost, lru, unused"),
        ({"batching": "none"}, "mixed, separate"),
        ({"overload": "drop"}, "promises, none"),
        ({"cluster_wait_s": -1.0}, "cluster_wait_s"),
        ({"cluster_wait_s": float("nan")}, "cluster_wait_s"),
        ({"ttft_slo_s": 0.0}, "ttft_slo_s"),
        ({"tenant_weights": {"gold": 0.0}}, "gold"),
        ({"tenant_weights": {"gold": float("inf")}}, "gold"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        PolicyChoice(**wrong)


def test_every_number_and_name_is_checked_by_the_test_above():
    checked = {"order", "admission", "eviction", "batching", "overload"}
    checked |= {"cluster_wait_s", "ttft_slo_s", "tenant_weights"}
    assert {f.name for f in fields(PolicyChoice)} == checked | {"has_prefix_cache"}


def test_weights_share_between_tenants_in_the_order_chosen():
    queue = make(PolicyChoice(tenant_weights={"gold": 4.0})).queue
    new = SequenceFactory()
    for tenant in ("gold", "free"):
        sequence = new(tenant=tenant)
        queue.push(sequence)
        queue.remove(sequence)
        queue.charge_prompt(sequence, 100)
    assert queue.counter("free") >= 4 * queue.counter("gold") > 0


def test_fairness_among_adapters_looks_at_adapters():
    queue = make(PolicyChoice(order="vtc-adapter")).queue
    new = SequenceFactory()
    sequences = [new(adapter="a", tenant="t") for _ in range(3)]
    other = new(adapter="b", tenant="t")
    for sequence in (*sequences, other):
        queue.push(sequence)
    queue.remove(sequences[0])
    queue.charge_prompt(sequences[0], 100)
    assert next(queue.in_order()) is other


def test_each_engine_gets_policies_of_its_own():
    first, second = make(PolicyChoice()), make(PolicyChoice())
    for field in fields(first):
        assert getattr(first, field.name) is not getattr(second, field.name)


@pytest.mark.parametrize(
    "choice",
    [
        PolicyChoice(order=order, admission=admission, batching=batching, cluster_wait_s=wait_s)
        for order, admission, batching, wait_s in product(ORDERS, ADMISSIONS, BATCHINGS, (0.0, 0.5))
    ],
    ids=str,
)
def test_every_combination_serves_everybody(choice):
    machine = TimedMachine(choice=choice, num_pages=150, answer_len=20)
    names = [
        machine.add(adapter=f"a{i % 6}" if i % 7 else None, tenant=f"t{i % 3}", priority=i % 2)
        for i in range(40)
    ]
    machine.run_until(60)
    assert machine.first_tokens.keys() == set(names)
    assert not machine.scheduler.has_work


def test_names_are_told_apart():
    for names in (ORDERS, ADMISSIONS, EVICTIONS, BATCHINGS, OVERLOADS):
        assert len(set(names)) == len(names) > 1
    assert replace(S_LORA, order="edf") != S_LORA
