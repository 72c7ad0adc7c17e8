"""Random lives of a scheduler: arrivals, aborts, loads that end or fail, in a pool too small.

After every step the accounts must agree; at the end everything that was accepted has ended exactly
once and every page is back.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex_memory.allocator import PageUse
from loraplex_scheduler.errors import RequestRefused
from loraplex_scheduler.plan import AdapterLoad, Event
from loraplex_scheduler.scheduler import Scheduler
from tests.support.scheduling import make_manifest, make_request, make_scheduler, result_of

ADAPTERS = [None, *(make_manifest(f"a{i}", rank) for i, rank in enumerate((1, 2, 4, 8, 8)))]


class Life:
    """Drives one scheduler and keeps count of who has ended."""

    def __init__(self) -> None:
        self.scheduler: Scheduler = make_scheduler(num_pages=24, max_model_len=40)
        self.loading: list[AdapterLoad] = []
        self.open: set[str] = set()
        self.ended: list[str] = []
        self.count = 0

    def arrive(self, adapter: int, num_prompt: int, max_tokens: int, **extra: float | None) -> None:
        self.count += 1
        request = make_request(
            f"r{self.count}",
            num_prompt=num_prompt,
            max_tokens=max_tokens,
            adapter=ADAPTERS[adapter],
            arrival_s=float(self.count),
            **extra,
        )
        try:
            self.scheduler.add(request)
        except RequestRefused:
            return
        self.open.add(request.request_id)

    def book(self, events: list[Event]) -> None:
        for event in events:
            assert event.request_id in self.open, "an event after the terminal one"
            if event.finish_reason is not None:
                self.open.remove(event.request_id)
                self.ended.append(event.request_id)

    def step(self, token_id: int = 9) -> None:
        plan = self.scheduler.schedule()
        self.loading += plan.loads
        self.scheduler.check()
        self.book(self.scheduler.commit(plan, result_of(plan, token_id)))

    def end_load(self, index: int, succeeds: bool) -> None:
        adapter_id = self.loading.pop(index % len(self.loading)).adapter.adapter_id
        if succeeds:
            self.scheduler.finish_load(adapter_id)
        else:
            self.book(self.scheduler.fail_load(adapter_id, "disk"))

    def drain(self) -> None:
        for _ in range(3000):
            if not self.scheduler.has_work:
                break
            self.step()
            while self.loading:
                self.end_load(0, succeeds=True)
        assert not self.open, f"never ended: {sorted(self.open)}"
        assert len(self.ended) == len(set(self.ended)), "a request ended twice"
        while self.loading:
            self.end_load(0, succeeds=True)
        assert self.scheduler._allocator.num_held(PageUse.KV) == 0
        self.scheduler._residency.evict_idle(10**6)
        assert self.scheduler._allocator.num_free == 24, "pages leaked"


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.life = Life()

    @rule(
        adapter=st.integers(0, len(ADAPTERS) - 1),
        num_prompt=st.integers(1, 44),
        max_tokens=st.integers(1, 30),
        deadline_s=st.one_of(st.none(), st.integers(0, 30)),
    )
    def arrive(
        self, adapter: int, num_prompt: int, max_tokens: int, deadline_s: float | None
    ) -> None:
        self.life.arrive(adapter, num_prompt, max_tokens, deadline_s=deadline_s)

    @rule(token_id=st.sampled_from([0, 9, 9, 9, 9, 9]))
    def step(self, token_id: int) -> None:
        self.life.step(token_id)

    @precondition(lambda self: self.life.loading)
    @rule(index=st.integers(0, 9), succeeds=st.booleans())
    def end_load(self, index: int, succeeds: bool) -> None:
        self.life.end_load(index, succeeds)

    @precondition(lambda self: self.life.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.life.open)))
        self.life.book(self.life.scheduler.abort(request_id))
        assert request_id not in self.life.open

    @rule(now=st.integers(0, 30))
    def time_passes(self, now: int) -> None:
        self.life.book(self.life.scheduler.expire(float(now)))

    @rule(name=st.sampled_from([a.adapter_id for a in ADAPTERS if a]))
    def discard(self, name: str) -> None:
        self.life.scheduler.discard_adapter(name)

    @invariant()
    def accounts_agree(self) -> None:
        self.life.scheduler.check()

    def teardown(self) -> None:
        self.life.drain()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_random_steps_leak_no_page(seed):
    rng, life = random.Random(seed), Life()
    for _ in range(2500):
        if rng.random() < 0.3 and len(life.open) < 40:
            life.arrive(rng.randrange(len(ADAPTERS)), rng.randint(1, 44), rng.randint(1, 30))
        if life.loading and rng.random() < 0.5:
            life.end_load(rng.randrange(9), succeeds=rng.random() < 0.9)
        if life.open and rng.random() < 0.05:
            life.book(life.scheduler.abort(rng.choice(sorted(life.open))))
        life.step(rng.choice([0, 9, 9, 9, 9, 9, 9, 9]))
        life.scheduler.check()
    assert life.scheduler.num_preemptions > 0
    assert life.scheduler.num_evictions > 0
    life.drain()
