"""Random lives of a scheduler: arrivals, aborts, loads that end or fail, in a pool too small.

After every step the accounts must agree, and every page must hold what the step reads. At the end
everything that was accepted has ended exactly once with its own answer, and every page is back.

All of it at depth 0 (each step committed before the next), at depth 1 (one step in flight while the
next is scheduled, as the engine does with overlap), and with both in any order; and with every
policy that can be chosen. Requests share prompts and adapters, so pages are shared, replaced and
found again all the time, and the device checks that each holds the text it is taken for.
"""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.allocator import PageUse
from loraplex_scheduler.errors import RequestRefused
from loraplex_scheduler.plan import AdapterLoad, Event, FinishReason, Plan, StepResult, TokenEvent
from loraplex_scheduler.policies import S_LORA, PolicyChoice
from loraplex_scheduler.scheduler import Scheduler
from tests.support.scheduling import make_manifest, make_request, make_scheduler
from tests.support.shadow_device import NOT_FINITE, ShadowDevice, answer_of

ADAPTERS = [
    None,
    *(make_manifest(f"a{i}", rank) for i, rank in enumerate((1, 2, 4, 8, 8))),
    make_manifest("activated", 2, is_activated=True),
    make_manifest("prompted", 1, num_virtual=6),
]

STOPS = frozenset({7})

CHOICES = (
    PolicyChoice(),
    PolicyChoice(order="fcfs", admission="greedy", eviction="lru"),
    PolicyChoice(order="vtc-adapter", admission="greedy", cluster_wait_s=3.0),
    PolicyChoice(order="lcfs", admission="worst-case", eviction="unused", has_prefix_cache=False),
    PolicyChoice(order="edf", admission="expected", eviction="unused"),
    S_LORA,
)

#: Ends that the answer itself brings, as against those that come from outside.
OWN_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


class Life:
    """Drives one scheduler, at most `depth` steps in flight, and keeps count of who has ended."""

    def __init__(self, depth: int = 0, choice: PolicyChoice = CHOICES[0]) -> None:
        self.depth = depth
        self.scheduler: Scheduler = make_scheduler(num_pages=24, max_model_len=40, choice=choice)
        self.device = ShadowDevice()
        self.loading: list[AdapterLoad] = []
        self.flights: deque[tuple[Plan, StepResult]] = deque()
        self.open: dict[str, tuple[list[int], FinishReason]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.free_ids: list[str] = []
        self.count = self.num_accepted = self.num_ended = 0
        self.now = 0.0

    def arrive(self, adapter: int, num_prompt: int, max_tokens: int, **extra: object) -> None:
        """Add a request, under the id of one that has ended where there is any."""
        self.count += 1
        manifest = ADAPTERS[adapter]
        if manifest is not None and manifest.spec.invocation_token_ids:
            extra["adapter_start"] = 7 * self.count % num_prompt
        elif manifest is not None:
            extra["num_virtual"] = min(manifest.spec.num_virtual_tokens, num_prompt - 1)
            extra |= self.mixture(manifest)
        request = make_request(
            self.free_ids[-1] if self.free_ids else f"r{self.count}",
            num_prompt=num_prompt,
            max_tokens=max_tokens,
            adapter=manifest,
            arrival_s=self.now,
            seed=self.count,
            **extra,
        )
        try:
            events = self.scheduler.add(request)
        except RequestRefused:
            return
        if events:
            (end,) = events
            assert end.finish_reason in (FinishReason.REJECTED, FinishReason.REFUSED)
            return
        if self.free_ids:
            self.free_ids.pop()
        self.num_accepted += 1
        max_len = self.scheduler._roster.get(request.request_id).max_len
        self.open[request.request_id] = answer_of(request, max_len)
        self.tokens[request.request_id] = []

    def mixture(self, manifest: AdapterManifest) -> dict[str, object]:
        """Let some requests of plain adapters take others in, or weigh them."""
        others = [a for a in ADAPTERS if a is not None and a.spec.is_additive and a is not manifest]
        if not manifest.spec.is_additive or self.count % 3:
            return {}
        more = others[self.count % 4 : self.count % 4 + self.count % 5 % 3]
        return {
            "adapter_weight": 0.5 * (self.count % 4),
            "more_adapters": tuple((other, 2.0) for other in more),
        }

    def book(self, events: list[Event]) -> None:
        for event in events:
            assert event.request_id in self.open, "an event after the terminal one"
            tokens = self.tokens[event.request_id]
            if isinstance(event, TokenEvent):
                tokens.append(event.token.token_id)
            answer, reason = self.open[event.request_id]
            assert tokens == answer[: len(tokens)], "not the tokens of this request"
            if event.finish_reason is not None:
                if event.finish_reason in OWN_ENDS or getattr(event, "message", "") == NOT_FINITE:
                    assert (tokens, event.finish_reason) == (answer, reason)
                del self.open[event.request_id]
                self.free_ids.append(event.request_id)
                self.num_ended += 1

    def step(self) -> None:
        """Do as `EngineCore.step` does."""
        while self.flights and self.scheduler.needs_known_tokens:
            self.land()
        num_launched = self.launch()
        while len(self.flights) > min(num_launched, self.depth):
            self.land()

    def launch(self) -> int:
        """Schedule and launch a step; return 0 when there was nothing to compute."""
        plan = self.scheduler.schedule(self.now)
        self.loading += plan.loads
        for load in plan.loads:
            self.device.begin_load(load)
        self.scheduler.check()
        if not plan.sequences:
            return 0
        self.flights.append((plan, self.device.launch(plan)))
        self.scheduler.advance(plan)
        self.scheduler.check()
        return 1

    def land(self) -> None:
        """Commit the step launched longest ago."""
        self.book(self.scheduler.commit(*self.flights.popleft()))
        self.scheduler.check()

    def end_load(self, index: int, succeeds: bool) -> None:
        load = self.loading.pop(index % len(self.loading))
        if succeeds:
            self.device.end_load(load)
            self.scheduler.finish_load(load.adapter.adapter_id)
        else:
            self.book(self.scheduler.fail_load(load.adapter.adapter_id, "disk"))

    def go_on_to(self, now: float) -> None:
        """Let time pass; whoever's deadline is past, or promise hopeless, ends."""
        self.now = max(self.now, now)
        self.book(self.scheduler.expire(self.now))
        self.book(self.scheduler.drop_hopeless(self.now))

    def drain(self) -> None:
        while len(self.flights) > 1:
            self.land()
        for _ in range(3000):
            if not self.scheduler.has_work:
                break
            self.now += 1.0  # bounded waits end by time
            self.step()
            while self.loading:
                self.end_load(0, succeeds=True)
        assert not self.open, f"never ended: {sorted(self.open)}"
        assert not self.flights, "a launched step was never committed"
        assert self.num_ended == self.num_accepted
        while self.loading:
            self.end_load(0, succeeds=True)
        accounts = self.scheduler.accounts
        assert accounts.allocator.num_held(PageUse.KV) == 0
        accounts.evict(24)
        assert accounts.num_free == 24, "pages leaked"


class AnyLife(RuleBasedStateMachine):
    """What can happen to a scheduler between steps."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.life = Life(depth)

    @initialize(choice=st.sampled_from(CHOICES))
    def choose(self, choice: PolicyChoice) -> None:
        self.life = Life(self.depth, choice)

    @rule(
        adapter=st.integers(0, len(ADAPTERS) - 1),
        num_prompt=st.integers(1, 44),
        max_tokens=st.integers(1, 30),
        deadline_s=st.one_of(st.none(), st.integers(0, 30)),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
        min_tokens=st.sampled_from([0, 0, 1]),
        first_token_by_s=st.one_of(st.none(), st.integers(0, 30)),
        tenant=st.sampled_from(["", "t"]),
        priority=st.sampled_from([0, 0, 0, 1]),
    )
    def arrive(self, adapter: int, num_prompt: int, max_tokens: int, **extra: object) -> None:
        self.life.arrive(adapter, num_prompt, max_tokens, stop_token_ids=STOPS, **extra)

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
        self.life.go_on_to(float(now))

    @rule(adapter=st.sampled_from([a for a in ADAPTERS if a]))
    def prefetch(self, adapter: AdapterManifest) -> None:
        self.life.scheduler.prefetch(adapter)

    @rule(name=st.sampled_from([a.adapter_id for a in ADAPTERS if a]))
    def discard(self, name: str) -> None:
        self.life.scheduler.discard_adapter(name)

    @rule(names=st.frozensets(st.sampled_from([a.adapter_id for a in ADAPTERS if a]), max_size=2))
    def keep(self, names: frozenset[str]) -> None:
        self.life.scheduler.keep_adapters(names)

    @invariant()
    def accounts_agree(self) -> None:
        self.life.scheduler.check()

    def teardown(self) -> None:
        self.life.drain()


class SequentialLife(AnyLife):
    def __init__(self) -> None:
        super().__init__(depth=0)

    @rule()
    def step(self) -> None:
        self.life.step()


class OverlappedLife(AnyLife):
    def __init__(self) -> None:
        super().__init__(depth=1)

    @rule()
    def step(self) -> None:
        self.life.step()


class InterleavedLife(AnyLife):
    """Launches and commits as they come, with anything else in between."""

    def __init__(self) -> None:
        super().__init__(depth=1)

    @precondition(lambda self: len(self.life.flights) <= 1)
    @precondition(lambda self: not self.life.scheduler.needs_known_tokens)
    @rule()
    def launch(self) -> None:
        self.life.launch()

    @precondition(lambda self: self.life.flights)
    @rule()
    def land(self) -> None:
        self.life.land()


SETTINGS = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestSequential = SequentialLife.TestCase
TestOverlapped = OverlappedLife.TestCase
TestInterleaved = InterleavedLife.TestCase
TestSequential.settings = TestOverlapped.settings = TestInterleaved.settings = SETTINGS


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("seed", range(len(CHOICES)))
def test_ten_thousand_random_steps_leak_no_page(seed, depth):
    rng, life = random.Random(seed), Life(depth, CHOICES[seed])
    for _ in range(2000):
        life.now += 0.1
        if rng.random() < 0.3 and len(life.open) < 40:
            life.arrive(
                rng.randrange(len(ADAPTERS)),
                rng.randint(1, 44),
                rng.randint(1, 30),
                presence_penalty=rng.choice([0.0] * 9 + [1.0]),
            )
        if life.loading and rng.random() < 0.5:
            life.end_load(rng.randrange(9), succeeds=rng.random() < 0.9)
        if life.open and rng.random() < 0.05:
            life.book(life.scheduler.abort(rng.choice(sorted(life.open))))
        life.step()
    never_preempts = CHOICES[seed].admission == "worst-case"
    assert (life.scheduler.num_preemptions == 0) == never_preempts
    assert (life.scheduler.num_prefix_hits > 0) == CHOICES[seed].has_prefix_cache
    assert life.scheduler.accounts.num_adapter_evictions > 0
    assert life.num_ended > 100
    life.drain()
