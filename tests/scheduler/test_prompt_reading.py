"""What a request wants of its prompt beside a next token, and how long it took to come to that."""

from __future__ import annotations

import dataclasses

import pytest

from loraplex_scheduler.plan import (
    HIDDEN_UNIT,
    EndEvent,
    FinishReason,
    Pooling,
    PromptEvent,
    StepResult,
    TokenEvent,
    TokenLogprobs,
)
from loraplex_scheduler.policies import PolicyChoice
from tests.support.scheduling import (
    compute,
    finish_loads,
    make_manifest,
    make_request,
    make_scheduler,
    result_of,
)

CACHING = PolicyChoice(order="fcfs", admission="greedy", eviction="lru", has_prefix_cache=True)


def thought(position: int) -> TokenLogprobs:
    """Return what the model thinks of the token behind a position."""
    return TokenLogprobs(-float(position), ())


def read(plan):
    """Return a result that has what steps want of prompts: each hidden state is its position."""
    result = result_of(plan)
    for step in plan.sequences:
        scored = tuple(map(thought, step.scored_positions))
        if scored:
            result.prompt_logprobs[step.request_id] = scored
        pooled = step.pooled_positions
        if step.request.pooling is Pooling.MEAN and pooled:
            result.hidden_sums[step.request_id] = (int(sum(pooled) / HIDDEN_UNIT),)
        elif pooled:
            result.embeddings[step.request_id] = (float(pooled[-1]),)
    tokens = {s.request_id: result.tokens[s.request_id] for s in plan.sequences if s.is_drawn}
    return dataclasses.replace(result, tokens=tokens)


def run(scheduler, max_steps=100):
    """Drive to the end, without overlap; return all events."""
    events = []
    for _ in range(max_steps):
        if not scheduler.has_work:
            return events
        plan = scheduler.schedule(0.0)
        scheduler.advance(plan)
        events += scheduler.commit(plan, read(plan))
        finish_loads(scheduler, plan)
        scheduler.check()
    raise AssertionError("the scheduler makes no progress")


def scores(events):
    return [logprobs for e in events if isinstance(e, PromptEvent) for logprobs in e.logprobs]


def test_a_prompt_is_scored_chunk_by_chunk_before_its_first_token():
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_request("r", num_prompt=20, max_tokens=2, prompt_logprobs=1))
    events = run(scheduler)
    assert [type(e) for e in events] == [PromptEvent] * 3 + [TokenEvent] * 2
    assert scores(events) == [thought(i) for i in range(19)]


def test_virtual_tokens_are_not_scored():
    scheduler = make_scheduler()
    adapter = make_manifest("a", num_virtual=3)
    scheduler.add(
        make_request("r", num_prompt=8, adapter=adapter, num_virtual=3, prompt_logprobs=0)
    )
    assert scores(run(scheduler)) == [thought(i) for i in range(3, 7)]


def test_a_prompt_of_one_token_has_nothing_to_score():
    scheduler = make_scheduler()
    scheduler.add(make_request("r", num_prompt=1, max_tokens=2, prompt_logprobs=1))
    assert [type(e) for e in run(scheduler)] == [TokenEvent] * 2


@pytest.mark.parametrize("wish", [{"prompt_logprobs": 1}, {"pooling": Pooling.MEAN}])
def test_a_prompt_that_is_wanted_whole_takes_nothing_from_the_prefix_cache(wish):
    scheduler = make_scheduler(choice=CACHING)
    scheduler.add(make_request("first", num_prompt=12))
    run(scheduler)
    pooling = wish.pop("pooling", None)
    request = make_request("second", num_prompt=12, max_tokens=1, **wish)
    scheduler.add(dataclasses.replace(request, pooling=pooling))
    (step,) = scheduler.schedule(0.0).sequences
    assert (step.start, step.num_tokens) == (0, 12)


def test_pages_of_a_scored_prompt_serve_others():
    scheduler = make_scheduler(choice=CACHING)
    scheduler.add(make_request("first", num_prompt=12, prompt_logprobs=1))
    run(scheduler)
    scheduler.add(make_request("second", num_prompt=12))
    (step,) = scheduler.schedule(0.0).sequences
    assert step.start == 8


def pooled(request_id, pooling, **options):
    request = make_request(request_id, max_tokens=1, **options)
    return dataclasses.replace(request, pooling=pooling)


@pytest.mark.parametrize(
    ("pooling", "expected"), [(Pooling.LAST, 19.0), (Pooling.MEAN, sum(range(20)) / 20)]
)
@pytest.mark.parametrize("max_step_tokens", [8, 11, 64])
def test_a_pooled_request_ends_with_its_embedding_and_no_token(pooling, expected, max_step_tokens):
    scheduler = make_scheduler(max_step_tokens=max_step_tokens)
    scheduler.add(pooled("r", pooling, num_prompt=20))
    (end,) = run(scheduler)
    assert isinstance(end, EndEvent)
    assert (end.finish_reason, end.embedding) == (FinishReason.STOP, (expected,))
    assert end.times is not None
    assert scheduler.accounts.allocator.num_free == 64


def test_the_mean_is_of_text_alone():
    scheduler = make_scheduler()
    adapter = make_manifest("a", num_virtual=3)
    scheduler.add(pooled("r", Pooling.MEAN, num_prompt=8, adapter=adapter, num_virtual=3))
    (end,) = run(scheduler)
    assert end.embedding == (5.0,)


@pytest.mark.parametrize("num_before", [1, 2])
def test_a_sequence_that_gave_way_tells_nothing_twice(num_before):
    """It computes its prompt again, also while a step of before is on its way."""
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.add(make_request("scored", num_prompt=24, max_tokens=1, prompt_logprobs=1))
    scheduler.add(pooled("mean", Pooling.MEAN, num_prompt=24))
    events = []
    for _ in range(num_before * 3):
        plan = scheduler.schedule(0.0)
        scheduler.advance(plan)
        for sequence in list(scheduler.running):
            scheduler._roster.preempt(sequence)
        events += scheduler.commit(plan, read(plan))
    events += run(scheduler)
    assert scores(events) == [thought(i) for i in range(23)]
    (end,) = [e for e in events if e.request_id == "mean"]
    assert end.embedding == (sum(range(24)) / 24,)


def test_times_before_the_first_token_add_up():
    scheduler = make_scheduler(max_step_tokens=8)
    adapter = make_manifest("a")
    scheduler.add(make_request("r", num_prompt=12, adapter=adapter, arrival_s=10.0))
    plan = scheduler.schedule(11.0)
    scheduler.schedule(12.0)  # still loading
    finish_loads(scheduler, plan)
    plan = scheduler.schedule(14.0)
    scheduler.advance(plan)
    scheduler.commit(plan, result_of(plan), now=15.0)
    plan = scheduler.schedule(15.5)
    scheduler.advance(plan)
    (event,) = scheduler.commit(plan, result_of(plan), now=17.0)
    assert (event.times.queue_s, event.times.load_s, event.times.prefill_s) == (1.0, 3.0, 3.0)
    (event,) = compute(scheduler, scheduler.schedule(18.0))
    assert event.times is None


def test_a_dead_end_is_the_requests_own_and_costs_nobody_the_prefix_cache():
    scheduler = make_scheduler(choice=CACHING)
    scheduler.add(make_request("r", num_prompt=12))
    plan = scheduler.schedule(0.0)
    scheduler.advance(plan)
    (end,) = scheduler.commit(plan, StepResult({}, dead_ends={"r": "no token is left"}))
    assert (end.finish_reason, end.message) == (FinishReason.REFUSED, "no token is left")
    scheduler.add(make_request("next", num_prompt=12))
    (step,) = scheduler.schedule(0.0).sequences
    assert step.start == 8


def test_a_failed_step_ends_a_pooled_request_as_any_other():
    scheduler = make_scheduler()
    scheduler.add(pooled("r", Pooling.LAST))
    plan = scheduler.schedule(0.0)
    scheduler.advance(plan)
    (end,) = scheduler.commit(plan, StepResult({}, {"r": "not finite"}))
    assert (end.finish_reason, end.embedding) == (FinishReason.FAILED, None)
