"""What comes closer before anybody waits for it, and what looking for it may cost."""

from __future__ import annotations

from loraplex_memory.page_table import PageTable
from tests.support.scheduling import (
    compute,
    finish_loads,
    make_manifest,
    make_request,
    make_scheduler,
)

#: Pages of `make_manifest(..., rank=1)` and `rank=8`.
SMALL, LARGE = 2, 14


def loads_of(plan):
    return [load.adapter.adapter_id for load in plan.loads]


def test_a_hint_is_loaded_into_pages_that_lie_idle():
    scheduler = make_scheduler(num_pages=20)
    scheduler.prefetch(make_manifest("a", rank=1))
    plan = scheduler.schedule(0.0)
    assert loads_of(plan) == [m.adapter_id for m in plan.prefetches] == ["a"]
    finish_loads(scheduler, plan)
    assert not scheduler.has_work
    assert loads_of(scheduler.schedule(0.0)) == []


def test_what_is_popular_comes_back_while_there_is_room():
    scheduler = make_scheduler(num_pages=LARGE + SMALL + 2)
    for name, rank, times in (("much", 1, 3), ("large", 8, 2), ("little", 1, 1)):
        for i in range(times):
            request_id = f"{name}{i}"
            scheduler.add(make_request(request_id, adapter=make_manifest(name, rank)))
            scheduler.abort(request_id)
    loaded = []
    while scheduler.has_work or not loaded:
        plan = scheduler.schedule(0.0)
        loaded += [loads_of(plan)]
        finish_loads(scheduler, plan)
        scheduler.check()
    assert [names for names in loaded if names] == [["much"], ["large"]]  # one at a time


def test_a_guess_takes_no_page_that_those_who_run_could_need():
    for num_spare, expected in ((SMALL - 1, []), (SMALL, ["a"])):
        scheduler = make_scheduler(num_pages=10 + num_spare)
        scheduler.add(make_request("r", num_prompt=4, max_tokens=36))
        compute(scheduler, scheduler.schedule(0.0))
        scheduler.prefetch(make_manifest("a", rank=1))
        assert loads_of(scheduler.schedule(0.0)) == expected


def test_many_guesses_for_which_there_is_no_room_cost_one_look_at_who_runs(monkeypatch):
    scheduler = make_scheduler(num_pages=101)
    scheduler.add(make_request("r", num_prompt=4, max_tokens=60))
    compute(scheduler, scheduler.schedule(0.0))
    for i in range(300):
        scheduler.add(make_request(f"r{i}", adapter=make_manifest(f"a{i}", rank=32)))
        scheduler.abort(f"r{i}")
    num_looks = 0
    pages_missing = PageTable.pages_missing

    def count(table, num_tokens):
        nonlocal num_looks
        num_looks += 1
        return pages_missing(table, num_tokens)

    monkeypatch.setattr(PageTable, "pages_missing", count)
    assert len(loads_of(scheduler.schedule(5.0))) == 1
    assert num_looks < 10
