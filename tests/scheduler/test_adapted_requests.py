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
