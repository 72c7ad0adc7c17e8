"""Scheduling on while a step is in flight, case by case."""

from __future__ import annotations

import pytest

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.allocator import PageUse
from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.plan import (
    EndEvent,
    FinishReason,
    SampledToken,
    StartTimes,
    StepResult,
    TokenEvent,
)
from loraplex_scheduler.sequence import Sequence
from tests.support.scheduling import (
    EOS,
    TINY,
    compute,
    finish_loads,
    make_accounts,
    make_manifest,
    make_request,
    make_scheduler,
    result_of,
)


def launch(scheduler):
    """Schedule a step and book that it was launched."""
    plan = scheduler.schedule(0.0)
    scheduler.advance(plan)
    scheduler.check()
    return plan


def only(plan):
    (step,) = plan.sequences
    return step


def test_the_next_step_takes_the_token_that_is_on_the_way():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", num_prompt=4, max_tokens=9))
    first = launch(scheduler)
    second = only(launch(scheduler))
    assert second.awaits_token
    assert (second.start, second.token_ids, second.num_tokens) == (4, (), 1)
    assert (second.position, second.is_sampled, len(second.block_table)) == (5, True, 2)
    (event,) = scheduler.commit(first, result_of(first, 7))
    assert event == TokenEvent("r", SampledToken(7), times=StartTimes(0.0, 0.0, 0.0))


def test_with_no_step_in_flight_nothing_is_awaited():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", num_prompt=4))
    compute(scheduler, scheduler.schedule(0.0), 7)
    step = only(scheduler.schedule(0.0))
    assert not step.awaits_token
    assert step.token_ids == (7,)


def test_a_chunk_of_a_prompt_leaves_nothing_to_await():
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_request("r", num_prompt=20))
    plans = [launch(scheduler)]
    for _ in range(3):
        plans.append(launch(scheduler))
        scheduler.commit(plans[-2], result_of(plans[-2]))
    steps = [only(plan) for plan in plans]
    assert [s.num_tokens for s in steps] == [8, 8, 4, 1]
    assert [s.awaits_token for s in steps] == [False, False, False, True]


def test_whoever_awaits_the_last_token_has_left_the_batch():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", max_tokens=1))
    plan = launch(scheduler)
    assert scheduler.accounts.allocator.num_held(PageUse.KV) == 0
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 0)
    assert scheduler.schedule(0.0).sequences == ()
    (event,) = scheduler.commit(plan, result_of(plan))
    assert event.finish_reason is FinishReason.LENGTH
    assert not scheduler.has_work


def test_a_place_in_the_batch_is_free_when_the_last_token_was_launched():
    scheduler = make_scheduler(max_running=1)
    scheduler.add(make_request("a", max_tokens=1))
    scheduler.add(make_request("b", max_tokens=1, arrival_s=1.0))
    assert only(launch(scheduler)).request_id == "a"
    assert only(launch(scheduler)).request_id == "b"


def test_a_step_too_far_gives_no_token_after_the_end():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", max_tokens=9))
    first, second = launch(scheduler), launch(scheduler)
    (event,) = scheduler.commit(first, result_of(first, EOS))
    assert event.finish_reason is FinishReason.STOP
    assert scheduler.accounts.allocator.num_held(PageUse.KV) == 0
    assert scheduler.has_work, "a step is in flight"
    assert scheduler.commit(second, result_of(second)) == []
    assert not scheduler.has_work


def test_a_failure_ends_a_request_that_was_launched_again():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", max_tokens=9))
    first, second = launch(scheduler), launch(scheduler)
    failed = StepResult({}, {"r": "not finite"})
    assert scheduler.commit(first, failed) == [EndEvent("r", FinishReason.FAILED, "not finite")]
    assert scheduler.commit(second, failed) == []


def test_a_new_owner_of_a_request_id_gets_no_token_of_the_old_one():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", num_prompt=3, max_tokens=9))
    old = launch(scheduler)
    scheduler.abort("r")
    scheduler.add(make_request("r", num_prompt=6, max_tokens=9))
    new = launch(scheduler)
    assert only(new).num_tokens == 6
    assert scheduler.commit(old, result_of(old, 7)) == []
    (event,) = scheduler.commit(new, result_of(new, 8))
    assert event.token == SampledToken(8)


def test_a_request_that_gave_way_gets_its_token_where_it_waits():
    scheduler = make_scheduler(num_pages=4, max_step_tokens=64)
    scheduler.add(make_request("old", num_prompt=7, max_tokens=9))
    scheduler.add(make_request("young", num_prompt=3, max_tokens=9, arrival_s=1.0))
    compute(scheduler, scheduler.schedule(0.0))
    first = launch(scheduler)  # both are at the end of a page
    second = launch(scheduler)
    assert scheduler.num_preemptions == 1
    assert only(second).request_id == "old"
    events = scheduler.commit(first, result_of(first, 7))
    assert {e.request_id for e in events} == {"old", "young"}
    scheduler.abort("old")
    scheduler.commit(second, result_of(second))
    again = only(launch(scheduler))
    assert (again.start, again.token_ids) == (0, (1, 2, 3, 9, 7))


def test_a_request_that_gave_way_may_end_where_it_waits():
    scheduler = make_scheduler(num_pages=4, max_step_tokens=64)
    scheduler.add(make_request("old", num_prompt=7, max_tokens=9))
    scheduler.add(make_request("young", num_prompt=3, max_tokens=9, arrival_s=1.0))
    compute(scheduler, scheduler.schedule(0.0))
    first = launch(scheduler)
    launch(scheduler)
    assert scheduler.num_waiting == 1
    result = StepResult({"old": SampledToken(7), "young": SampledToken(EOS)})
    assert scheduler.commit(first, result)[1].finish_reason is FinishReason.STOP
    assert scheduler.num_waiting == 0
    scheduler.check()


def test_penalties_need_the_ids_of_all_tokens():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", num_prompt=4, max_tokens=9, presence_penalty=1.0))
    plan = launch(scheduler)
    assert scheduler.needs_known_tokens
    scheduler.commit(plan, result_of(plan, 7))
    assert not scheduler.needs_known_tokens
    assert only(launch(scheduler)).history == (1, 2, 3, 4, 7)


def test_penalties_do_not_matter_before_the_first_token_and_after_the_last():
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_request("r", num_prompt=12, max_tokens=1, presence_penalty=1.0))
    first = launch(scheduler)
    assert not scheduler.needs_known_tokens
    launch(scheduler)
    scheduler.commit(first, StepResult({}))
    assert not scheduler.needs_known_tokens


def test_end_tokens_are_banned_by_count_though_no_id_is_known():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", min_tokens=1, max_tokens=9))
    assert only(launch(scheduler)).banned_token_ids == {EOS}
    assert only(launch(scheduler)).banned_token_ids == frozenset()


def test_results_come_in_the_order_of_the_launches():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", max_tokens=9))
    launch(scheduler)
    second = launch(scheduler)
    with pytest.raises(AssertionError, match="order of the launches"):
        scheduler.commit(second, result_of(second))


def test_a_third_step_is_not_scheduled_before_the_first_is_committed():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", max_tokens=9))
    launch(scheduler)
    launch(scheduler)
    with pytest.raises(AssertionError, match="two steps"):
        scheduler.schedule(0.0)


def test_an_adapter_may_leave_while_a_step_in_flight_reads_it():
    adapter = make_manifest("a", rank=8)
    num_pages = AdapterLayout(PoolLayout(TINY, 4), adapter.spec).num_pages
    scheduler = make_scheduler(num_pages=num_pages + 4, max_step_tokens=64)
    scheduler.add(make_request("r", adapter=adapter, max_tokens=1))
    finish_loads(scheduler, scheduler.schedule(0.0))
    plan = launch(scheduler)
    assert only(plan).adapter_id == "a"
    scheduler.add(make_request("big", num_prompt=20, max_tokens=1))
    assert only(launch(scheduler)).request_id == "big"
    assert scheduler.accounts.num_adapter_evictions == 1
    (event,) = scheduler.commit(plan, result_of(plan))
    assert event.finish_reason is FinishReason.LENGTH


def test_a_deleted_adapter_leaves_though_an_aborted_request_is_in_flight():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", adapter=make_manifest("a")))
    finish_loads(scheduler, scheduler.schedule(0.0))
    plan = launch(scheduler)
    scheduler.discard_adapter("a")
    assert scheduler.accounts.residency.is_resident("a")
    scheduler.abort("r")
    scheduler.discard_adapter("a")
    assert scheduler.accounts.residency.state("a") is None
    assert scheduler.commit(plan, result_of(plan)) == []


@pytest.mark.parametrize(("num_tokens", "awaits"), [(4, False), (6, False), (7, True)])
def test_only_a_span_that_reaches_an_awaited_token_takes_it(num_tokens, awaits):
    accounts = make_accounts(num_pages=8, page_tokens=3)
    table = accounts.new_table(None)
    request = make_request("r", num_prompt=6, max_tokens=9)
    sequence = Sequence(
        request, order=0, table=table, layouts=(), max_len=20, eos_token_ids=frozenset()
    )
    sequence.num_tokens = 7  # gave way with a token on the way
    table.grow(sequence.num_tokens)
    step = sequence.step(num_tokens)
    assert (step.awaits_token, step.is_sampled) == (awaits, awaits)
    assert (step.num_tokens, step.token_ids) == (num_tokens, (1, 2, 3, 4, 5, 6)[:num_tokens])
