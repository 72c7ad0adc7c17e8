"""What the scheduler decides, case by case."""

from __future__ import annotations

import pytest

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.allocator import PageUse
from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.errors import InvalidSampling, RequestRefused
from loraplex_scheduler.plan import EndEvent, FinishReason, StepResult, TokenEvent
from loraplex_scheduler.policies import PolicyChoice
from loraplex_scheduler.sampling import SamplingParams
from tests.support.scheduling import (
    EOS,
    TINY,
    compute,
    finish_loads,
    make_manifest,
    make_request,
    make_scheduler,
    result_of,
)

#: What `make_manifest(..., rank=8)` takes in the pools of these tests.
ADAPTER_PAGES = AdapterLayout(PoolLayout(TINY, 4), make_manifest("a", 8).spec).num_pages


def run(scheduler, *, token_id=9, max_steps=200):
    """Drive to the end; return all events."""
    events = []
    for _ in range(max_steps):
        if not scheduler.has_work:
            return events
        plan = scheduler.schedule(0.0)
        scheduler.check()
        events += compute(scheduler, plan, token_id)
        finish_loads(scheduler, plan)
        scheduler.check()
    raise AssertionError("the scheduler makes no progress")


def tokens_of(events, request_id):
    return [e for e in events if isinstance(e, TokenEvent) and e.request_id == request_id]


def test_a_request_ends_after_max_tokens():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", max_tokens=3))
    events = run(scheduler)
    assert [e.finish_reason for e in events] == [None, None, FinishReason.LENGTH]
    assert scheduler.num_running == scheduler.num_waiting == 0


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_request("r", num_prompt=19, max_tokens=1))
    spans = []
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        spans += [(s.start, s.num_tokens, s.is_sampled) for s in plan.sequences]
        compute(scheduler, plan)
    assert spans == [(0, 8, False), (8, 8, False), (16, 3, True)]


def test_decodes_are_not_held_up_by_a_long_prompt():
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_request("old", num_prompt=30, max_tokens=2))
    plan = scheduler.schedule(0.0)
    compute(scheduler, plan)
    scheduler.add(make_request("young", num_prompt=2, max_tokens=9, arrival_s=1.0))
    planned = []
    for _ in range(5):
        plan = scheduler.schedule(0.0)
        planned.append({s.request_id: s.num_tokens for s in plan.sequences})
        assert sum(s.num_tokens for s in plan.sequences) <= 8
        compute(scheduler, plan)
    running_together = [p for p in planned if "young" in p and "old" in p]
    assert running_together
    assert all(p["young"] >= 1 for p in running_together)


def test_service_is_in_order_of_arrival():
    scheduler = make_scheduler(max_running=1)
    for name, arrival in (("late", 2.0), ("early", 1.0)):
        scheduler.add(make_request(name, max_tokens=1, arrival_s=arrival))
    assert [e.request_id for e in run(scheduler)] == ["early", "late"]


def test_when_pages_run_out_the_youngest_recomputes_and_nothing_is_lost():
    scheduler = make_scheduler(num_pages=8, max_step_tokens=64)
    for i in range(3):
        scheduler.add(make_request(f"r{i}", num_prompt=4, max_tokens=16, arrival_s=i))
    events = run(scheduler)
    assert scheduler.num_preemptions > 0
    for i in range(3):
        assert len(tokens_of(events, f"r{i}")) == 16
    ends = [e.request_id for e in events if e.finish_reason]
    assert ends[0] == "r0"


def test_a_request_waits_for_its_adapter_and_others_do_not():
    scheduler = make_scheduler()
    scheduler.add(make_request("slow", adapter=make_manifest("a")))
    scheduler.add(make_request("fast", arrival_s=1.0))
    plan = scheduler.schedule(0.0)
    assert [load.adapter.adapter_id for load in plan.loads] == ["a"]
    assert [s.request_id for s in plan.sequences] == ["fast"]
    compute(scheduler, plan)
    again = scheduler.schedule(0.0)
    assert again.loads == ()
    compute(scheduler, again)
    scheduler.finish_load("a")
    plan = scheduler.schedule(0.0)
    assert {s.request_id for s in plan.sequences} == {"slow", "fast"}
    assert plan.adapters["a"].pages


def test_an_idle_adapter_leaves_only_when_the_space_is_needed():
    adapter = make_manifest("a", rank=8)
    scheduler = make_scheduler(num_pages=16, max_step_tokens=64)
    scheduler.add(make_request("r", adapter=adapter, max_tokens=1))
    run(scheduler)
    assert scheduler.accounts.residency.is_resident("a")
    assert scheduler.accounts.allocator.num_held(PageUse.ADAPTER) > 8
    scheduler.add(make_request("big", num_prompt=40, max_tokens=8))
    run(scheduler)
    assert not scheduler.accounts.residency.is_resident("a")
    assert scheduler.accounts.num_adapter_evictions == 1


def test_loading_for_the_queue_does_not_evict_what_an_earlier_request_waits_for():
    scheduler = make_scheduler(num_pages=20, max_running=1, max_step_tokens=16)
    pages = {}
    for i in range(3):
        manifest = make_manifest(f"a{i}", rank=8)
        scheduler.add(make_request(f"r{i}", adapter=manifest, arrival_s=i))
    plan = scheduler.schedule(0.0)
    for load in plan.loads:
        pages[load.adapter.adapter_id] = load.pages
    assert list(pages) == ["a0"]  # a1 does not fit beside it and may not push it out
    run_events = []
    finish_loads(scheduler, plan)
    run_events = run(scheduler)
    assert len([e for e in run_events if e.finish_reason]) == 3


def test_a_failed_load_fails_its_requests_and_nobody_else():
    scheduler = make_scheduler()
    scheduler.add(make_request("broken", adapter=make_manifest("a")))
    scheduler.add(make_request("fine"))
    plan = scheduler.schedule(0.0)
    compute(scheduler, plan)
    events = scheduler.fail_load("a", "the file is gone")
    assert events == [EndEvent("broken", FinishReason.FAILED, "the file is gone")]
    assert len(tokens_of(run(scheduler), "fine")) == 3
    scheduler.check()


def test_abort_works_while_waiting_loading_running_and_after_the_end():
    scheduler = make_scheduler()
    scheduler.add(make_request("loading", adapter=make_manifest("a")))
    scheduler.add(make_request("running", arrival_s=1.0))
    plan = scheduler.schedule(0.0)
    scheduler.advance(plan)
    for name in ("loading", "running"):
        (event,) = scheduler.abort(name)
        assert event.finish_reason is FinishReason.CANCELLED
        scheduler.check()
    assert scheduler.commit(plan, result_of(plan)) == []
    assert scheduler.abort("running") == []
    scheduler.finish_load("a")
    scheduler.check()


def test_a_request_past_its_deadline_ends_as_timed_out():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", deadline_s=5.0))
    assert scheduler.expire(4.9) == []
    (event,) = scheduler.expire(5.0)
    assert event.finish_reason is FinishReason.TIMED_OUT
    assert not scheduler.has_work


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (make_request("r", num_prompt=0), "empty"),
        (make_request("r", num_prompt=64), "limit is 64"),
        (make_request("r", num_prompt=9, adapter=make_manifest("a", rank=8)), "holds 8 beside"),
        (make_request("r", num_prompt=1, adapter=make_manifest("a", rank=64)), "larger pool"),
    ],
)
def test_a_request_that_could_never_run_is_refused(request_, words):
    scheduler = make_scheduler(num_pages=ADAPTER_PAGES + 2)
    with pytest.raises(RequestRefused, match=words):
        scheduler.add(request_)
    assert not scheduler.has_work


def test_an_answer_ends_where_the_pool_does():
    scheduler = make_scheduler(num_pages=ADAPTER_PAGES + 2)
    scheduler.add(make_request("r", num_prompt=3, max_tokens=60, adapter=make_manifest("a", 8)))
    events = run(scheduler)
    assert len(events) == 2 * 4 - 3
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_a_request_waiting_for_its_adapter_is_not_starved_by_younger_ones():
    scheduler = make_scheduler(num_pages=ADAPTER_PAGES + 6, max_step_tokens=64, max_running=16)
    adapter = make_manifest("a", rank=8)
    scheduler.add(make_request("old", num_prompt=12, adapter=adapter))
    loading, num_young, ended = [], 0, []
    for _ in range(200):
        while scheduler.num_waiting < 4:  # there is always somebody younger
            num_young += 1
            scheduler.add(
                make_request(f"y{num_young}", num_prompt=8, max_tokens=16, arrival_s=num_young)
            )
        plan = scheduler.schedule(0.0)
        scheduler.check()
        ended += [e.request_id for e in compute(scheduler, plan) if e.finish_reason]
        loading = [(load, age + 1) for load, age in loading] + [(load, 0) for load in plan.loads]
        for load, _ in [pair for pair in loading if pair[1] == 3]:
            scheduler.finish_load(load.adapter.adapter_id)
        if "old" in ended:
            return
    raise AssertionError(f"starved while {len(ended)} younger requests finished")


def test_a_load_takes_no_page_that_a_running_sequence_needs_next():
    scheduler = make_scheduler(num_pages=ADAPTER_PAGES + 3, max_step_tokens=64)
    scheduler.add(make_request("running", num_prompt=7, max_tokens=5))
    plan = scheduler.schedule(0.0)
    compute(scheduler, plan)
    scheduler.add(make_request("w", num_prompt=3, adapter=make_manifest("a", 8), arrival_s=1.0))
    while scheduler.num_running:  # the load takes as long as the answer
        plan = scheduler.schedule(0.0)
        assert [s.request_id for s in plan.sequences] == ["running"]
        compute(scheduler, plan)
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize("adapter", [None, make_manifest("a", rank=1)])
def test_nobody_finds_the_pages_of_a_request_that_failed(adapter):
    scheduler = make_scheduler(choice=PolicyChoice())
    for name in ("first", "second"):
        scheduler.add(make_request(name, num_prompt=12, adapter=adapter))
        plan = scheduler.schedule(0.0)
        if plan.loads:
            finish_loads(scheduler, plan)
            plan = scheduler.schedule(0.0)
        assert [(s.request_id, s.start) for s in plan.sequences] == [(name, 0)]
        scheduler.advance(plan)
        failed = scheduler.commit(plan, StepResult({}, {name: "not finite"}))
        assert [e.finish_reason for e in failed] == [FinishReason.FAILED]
        scheduler.check()


@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_in_the_worst_case_a_slow_load_makes_nobody_give_way(has_prefix_cache):
    """What the newcomer itself needs once it runs is of no use to the others before that."""
    choice = PolicyChoice(admission="worst-case", has_prefix_cache=has_prefix_cache)
    scheduler = make_scheduler(num_pages=ADAPTER_PAGES + 10, max_step_tokens=64, choice=choice)
    for name in ("r", "s"):
        prompt = tuple(ord(name) + i for i in range(4))
        scheduler.add(make_request(name, prompt=prompt, max_tokens=20))
    compute(scheduler, scheduler.schedule(0.0))
    new = make_request("w", num_prompt=32, max_tokens=1, adapter=make_manifest("a", 8))
    scheduler.add(new)
    loads = []
    while scheduler.num_running:
        plan = scheduler.schedule(0.0)
        loads += plan.loads
        compute(scheduler, plan)
    assert scheduler.num_preemptions == 0
    while not loads:
        loads += scheduler.schedule(0.0).loads
    scheduler.finish_load(loads[0].adapter.adapter_id)
    assert [e.request_id for e in run(scheduler)] == ["w"]


def test_end_tokens_stop_unless_they_are_ignored_or_too_early():
    for kwargs, expected in (
        ({}, (1, FinishReason.STOP)),
        ({"ignore_eos": True}, (4, FinishReason.LENGTH)),
        ({"stop_token_ids": frozenset({EOS}), "ignore_eos": True}, (1, FinishReason.STOP)),
    ):
        scheduler = make_scheduler()
        scheduler.add(make_request("r", **kwargs))
        events = run(scheduler, token_id=EOS)
        assert (len(events), events[-1].finish_reason) == expected


def test_end_tokens_are_banned_until_min_tokens():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", min_tokens=2, stop_token_ids=frozenset({7})))
    banned = []
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        banned += [s.banned_token_ids for s in plan.sequences]
        compute(scheduler, plan)
    assert banned == [{EOS, 7}, {EOS, 7}, frozenset(), frozenset()]


def test_a_deleted_adapter_leaves_when_nobody_uses_it():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", adapter=make_manifest("a")))
    finish_loads(scheduler, scheduler.schedule(0.0))
    scheduler.discard_adapter("a")
    assert scheduler.accounts.residency.is_resident("a")
    run(scheduler)
    scheduler.discard_adapter("a")
    assert scheduler.accounts.residency.state("a") is None


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("min_tokens", 99),
        ("logprobs", 21),
    ],
)
def test_sampling_out_of_range_is_refused_by_name(param, value):
    with pytest.raises(InvalidSampling) as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == param


def test_a_kept_adapter_outlasts_others_and_gives_way_only_to_who_could_not_run_else():
    scheduler = make_scheduler(num_pages=3 * ADAPTER_PAGES, max_model_len=256)
    for name in ("kept", "other"):
        scheduler.add(make_request(name, adapter=make_manifest(name, 8)))
        run(scheduler)
    scheduler.keep_adapters(frozenset({"kept"}))
    scheduler.add(make_request("b", adapter=make_manifest("b", 8)))
    scheduler.add(make_request("c", adapter=make_manifest("c", 8)))
    run(scheduler)
    residency = scheduler.accounts.residency
    assert residency.is_resident("kept")
    assert not residency.is_resident("other")
    num_tokens = (2 * ADAPTER_PAGES + 1) * 4
    assert num_tokens + 1 < 256
    scheduler.add(make_request("long", num_prompt=num_tokens, max_tokens=1))
    run(scheduler)
    assert not residency.is_resident("kept")


def test_who_runs_gives_way_before_a_kept_adapter_does():
    scheduler = make_scheduler(num_pages=ADAPTER_PAGES + 8, max_model_len=64)
    scheduler.add(make_request("first", adapter=make_manifest("kept", 8)))
    run(scheduler)
    scheduler.keep_adapters(frozenset({"kept"}))
    scheduler.add(make_request("a", num_prompt=8, max_tokens=20, ignore_eos=True))
    scheduler.add(make_request("b", num_prompt=8, max_tokens=20, ignore_eos=True))
    events = run(scheduler)
    assert scheduler.num_preemptions > 0
    assert scheduler.accounts.residency.is_resident("kept")
    assert sum(e.finish_reason is FinishReason.LENGTH for e in events) == 2
