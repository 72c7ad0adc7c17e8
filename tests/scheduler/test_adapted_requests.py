"""Requests whose adapter begins inside the prompt, or brings tokens of its own."""

from __future__ import annotations

import dataclasses

import pytest

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.errors import RequestRefused
from loraplex_scheduler.plan import TokenEvent
from loraplex_scheduler.policies import PolicyChoice
from tests.support.scheduling import (
    TINY,
    compute,
    finish_loads,
    make_manifest,
    make_request,
    make_scheduler,
)

ACTIVATED = make_manifest("activated", is_activated=True)
PROMPTED = make_manifest("prompted", num_virtual=6)


@pytest.fixture(name="scheduler")
def _scheduler():
    return make_scheduler(max_step_tokens=64, choice=PolicyChoice())


def first_token(scheduler, request):
    """Run one request to its end; return its first event."""
    events = scheduler.add(request)
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        events += compute(scheduler, plan)
        finish_loads(scheduler, plan)
        scheduler.check()
    first = events[0]
    assert isinstance(first, TokenEvent)
    return first


def activated(request_id, adapter_start, num_prompt=20):
    return make_request(
        request_id, num_prompt=num_prompt, adapter=ACTIVATED, adapter_start=adapter_start
    )


def test_an_activated_adapter_finds_the_bases_pages_before_its_start(scheduler):
    first_token(scheduler, make_request("base", num_prompt=20))
    assert first_token(scheduler, activated("late", 14)).num_cached == 12
    assert first_token(scheduler, activated("later", 16)).num_cached == 16
    assert first_token(scheduler, activated("early", 3)).num_cached == 0


def test_the_base_finds_the_pages_that_an_activated_adapter_computed(scheduler):
    first_token(scheduler, activated("a", 14))
    assert first_token(scheduler, make_request("base", num_prompt=20)).num_cached == 12


def test_what_an_activated_adapter_changed_is_found_by_nobody(scheduler):
    first_token(scheduler, activated("a", 6))
    assert first_token(scheduler, activated("same", 6)).num_cached == 4
    assert scheduler.accounts.prefixes.pages_by_adapter() == {None: 1}


def test_virtual_tokens_are_shared_and_not_reported(scheduler):
    request = make_request("a", num_prompt=16, adapter=PROMPTED, num_virtual=6)
    assert first_token(scheduler, request).num_cached == 0
    again = dataclasses.replace(request, request_id="again")
    assert first_token(scheduler, again).num_cached == 12 - 6
    other = (*request.prompt_token_ids[:6], *[40] * 10)
    other_text = dataclasses.replace(request, request_id="other", prompt_token_ids=other)
    assert first_token(scheduler, other_text).num_cached == 0
    assert scheduler.num_prefix_hits == 12 + 4, "the first page was found"


def test_penalties_see_no_virtual_token(scheduler):
    scheduler.add(
        make_request(
            "r", num_prompt=16, adapter=PROMPTED, num_virtual=6, max_tokens=2, presence_penalty=1.0
        )
    )
    histories = []
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        histories += [(step.history, step.num_prompt_text) for step in plan.sequences]
        compute(scheduler, plan)
        finish_loads(scheduler, plan)
    text = tuple(range(7, 17))
    assert histories == [(text, 10), ((*text, 9), 10)]


def test_a_prompt_too_long_with_virtual_tokens_is_refused_by_their_name(scheduler):
    with pytest.raises(RequestRefused, match="58 tokens behind 6 virtual tokens of the adapter"):
        scheduler.add(make_request("r", num_prompt=64, adapter=PROMPTED, num_virtual=6))
    with pytest.raises(RequestRefused, match="the prompt is empty"):
        scheduler.add(make_request("r", num_prompt=6, adapter=PROMPTED, num_virtual=6))


def test_a_prompt_of_an_adapter_takes_pages_for_its_parts():
    plain, prompted = (AdapterLayout(PoolLayout(TINY, 4), m.spec) for m in (ACTIVATED, PROMPTED))
    assert prompted.num_pages > plain.num_pages


# ---- weights and mixtures ------------------------------------------------------------------

A, B = make_manifest("a"), make_manifest("b")


def mixture(request_id="mixed", **fields):
    return make_request(request_id, adapter=A, more_adapters=((B, 0.5),), **fields)


def test_a_mixture_runs_once_all_its_adapters_are_there(scheduler):
    scheduler.add(mixture())
    plan = scheduler.schedule(0.0)
    assert [load.adapter.adapter_id for load in plan.loads] == ["a", "b"]
    assert plan.sequences == ()
    scheduler.finish_load("b")
    assert scheduler.schedule(0.0).sequences == ()
    scheduler.finish_load("a")
    plan = scheduler.schedule(0.0)
    assert set(plan.adapters) == {"a", "b"}
    assert scheduler.accounts.residency.num_pins() == 2
    assert scheduler.running_adapters() == {"a", "b"}
    scheduler.check()
    scheduler.advance(plan)
    scheduler.abort("mixed")
    assert scheduler.accounts.residency.num_pins() == 0
    scheduler.check()


def test_a_mixture_fails_with_any_of_its_adapters_and_nobody_else_does(scheduler):
    scheduler.add(mixture())
    scheduler.add(make_request("only a", adapter=A))
    scheduler.schedule(0.0)
    assert [e.request_id for e in scheduler.fail_load("b", "disk")] == ["mixed"]
    scheduler.finish_load("a")
    assert [s.request_id for s in scheduler.schedule(0.0).sequences] == ["only a"]
    scheduler.check()


def test_a_mixture_that_the_pool_cannot_hold_is_refused_though_each_adapter_fits():
    large = [make_manifest(name, rank=16) for name in ("a", "b")]
    num_pages = AdapterLayout(PoolLayout(TINY, 4), large[0].spec).num_pages
    scheduler = make_scheduler(num_pages=num_pages + 4, choice=PolicyChoice())
    scheduler.add(make_request("one", adapter=large[0]))
    request = make_request("both", adapter=large[0], more_adapters=((large[1], 1.0),))
    with pytest.raises(RequestRefused, match=f"beside the {2 * num_pages} pages of adapters"):
        scheduler.add(request)


def test_a_deleted_adapter_stays_while_a_mixture_runs_with_it(scheduler):
    scheduler.add(mixture())
    finish_loads(scheduler, scheduler.schedule(0.0))
    plan = scheduler.schedule(0.0)
    scheduler.discard_adapter("b")
    compute(scheduler, plan)
    assert scheduler.is_resident("b")
    scheduler.abort("mixed")
    scheduler.discard_adapter("b")
    assert not scheduler.is_resident("b")
    scheduler.check()


def test_weighted_adapters_share_no_prefix(scheduler):
    weighted = make_request("w", num_prompt=20, adapter=A, adapter_weight=0.5)
    first_token(scheduler, make_request("plain", num_prompt=20, adapter=A))
    assert first_token(scheduler, weighted).num_cached == 0
    again = dataclasses.replace(weighted, request_id="again")
    assert first_token(scheduler, again).num_cached == 0
    plain = make_request("plain again", num_prompt=20, adapter=A)
    assert first_token(scheduler, plain).num_cached == 16


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"adapter": PROMPTED, "adapter_weight": 0.5}, "more than add"),
        ({"adapter": A, "more_adapters": ((PROMPTED, 1.0),)}, "more than add"),
        ({"adapter": A, "more_adapters": ((A, 1.0),)}, "must differ"),
        ({"adapter": A, "adapter_weight": float("nan")}, "not finite"),
        ({"more_adapters": ((A, 1.0),)}, "no adapter to mix with"),
    ],
    ids=["weighted", "mixed", "twice", "nan", "base"],
)
def test_mixtures_that_make_no_sense_are_refused(scheduler, fields, words):
    with pytest.raises(RequestRefused, match=words):
        scheduler.add(make_request("r", **fields))
