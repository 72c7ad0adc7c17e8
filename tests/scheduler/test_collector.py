"""Collections of cyclic garbage: between steps, rarely, and with nothing of the steps' to find."""

from __future__ import annotations

import gc
import weakref

import pytest

from loraplex_scheduler.collector import CycleCollector
from loraplex_scheduler.policies import PolicyChoice
from tests.support.scheduling import (
    compute,
    finish_loads,
    make_manifest,
    make_request,
    make_scheduler,
)


class _Knot:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _leave_the_collector_as_it_was():
    yield
    gc.unfreeze()
    gc.enable()


def knot():
    """Return a weak reference to garbage."""
    return weakref.ref(_Knot())


def test_an_idle_engine_collects_every_minute_and_a_busy_one_every_ten():
    collector = CycleCollector(0.0)
    first = knot()
    collector.collect_if_due(59.0, is_idle=True)
    collector.collect_if_due(599.0, is_idle=False)
    assert first() is not None
    collector.collect_if_due(60.0, is_idle=True)
    assert first() is None
    second = knot()
    collector.collect_if_due(660.0, is_idle=False)
    assert second() is None


def test_what_start_up_left_is_given_back_in_the_end():
    collector = CycleCollector(0.0)
    assert gc.get_freeze_count() > 0
    collector.release()
    assert gc.get_freeze_count() == 0


def test_steps_leave_no_cycles_behind():
    scheduler = make_scheduler(choice=PolicyChoice(), max_running=3)
    CycleCollector(0.0)
    for i in range(60):
        adapter = make_manifest(f"a{i % 9}")
        prompt = tuple(range(i, i + 13))
        scheduler.add(
            make_request(f"r{i}", prompt=prompt, adapter=adapter, arrival_s=float(i), max_tokens=6)
        )
        plan = scheduler.schedule(float(i))
        compute(scheduler, plan)
        finish_loads(scheduler, plan)
    assert scheduler.accounts.num_prefix_evictions + scheduler.accounts.num_adapter_evictions > 0
    del plan
    assert gc.collect() == 0
