"""One engine in simulated time: the real scheduler and accounts, a roofline for the device.

The engine's loop is the real one: arrivals, ended loads, `schedule`, the step, `commit`. A step
takes what the roofline says; loads run beside it. An engine that *blocks* on loads (S-LoRA's)
computes nothing until the loads that its waiting requests need have ended, and starts no other.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_spec import AdapterRanks, AdapterSpec
from loraplex_memory.allocator import PageUse
from loraplex_scheduler.fit import AdapterLayouts
from loraplex_scheduler.plan import Event, Plan, SampledToken, StepResult, TokenEvent
from loraplex_scheduler.scheduler import Scheduler
from loraplex_server.simulator.link import AdapterLink
from loraplex_server.simulator.object_store import ObjectStore
from loraplex_server.simulator.requests import RequestBook
from loraplex_server.simulator.results import Counters, Found, Record
from loraplex_server.simulator.roofline import Roofline, StepWork
from loraplex_server.simulator.routing.router import ReplicaReport


class BlockingLoads(Protocol):
    """What an engine that waits for its loads knows of them."""

    def is_needed(self, adapter_id: str) -> bool:
        """Whether a request that may run now needs it; other loads are not done."""

    def loaded(self) -> None:
        """The loads that were needed have ended: requests may be admitted at once."""


@dataclass(frozen=True)
class EngineParts:
    """What a replica drives; each replica has its own.

    Attributes:
        blocking: set in an engine that computes nothing while a needed adapter is loaded.
        reads_adapters_per_row: decode rows each read their adapter from memory, whoever else reads
            the same one (S-LoRA's kernel).
        store: where adapter files come from that are not in host memory; None where the disk of
            the link holds them all.
        page_bytes: of one page of the pool, all layers.
    """

    scheduler: Scheduler
    accounts: PoolAccounts
    link: AdapterLink
    roofline: Roofline
    blocking: BlockingLoads | None = None
    reads_adapters_per_row: bool = False
    store: ObjectStore | None = None
    page_bytes: float = 0.0

    def pages_of(self, ranks: AdapterRanks) -> int:
        """Return how many pages an adapter of these ranks takes."""
        return AdapterLayout(self.accounts.layout, AdapterSpec(ranks)).num_pages


class Replica:
    """One engine's event loop. Its time `now` only goes forward.

    Attributes:
        ended_s: when requests ended, in order; a router forgets those it has counted.
        check: called after every step; tests put the scheduler's own check here.
    """

    def __init__(
        self,
        parts: EngineParts,
        book: RequestBook,
        record: Record,
        on_end: Callable[[int, float], None],
    ) -> None:
        """`on_end` is told of every request that was answered in full, and when."""
        self.parts = parts
        self._scheduler = parts.scheduler
        self._book = book
        self._sizes = AdapterLayouts(parts.accounts.layout)
        self._record = record
        self._on_end = on_end
        self._incoming: list[tuple[float, int]] = []
        self._fetching: list[tuple[float, int]] = []
        self._tokens: dict[str, SampledToken] = {}
        self._begun: set[str] = set()
        self.now = 0.0
        self.ended_s: deque[float] = deque()
        self.check: Callable[[], None] | None = None
        self._num_steps = 0
        self._busy_s = 0.0
        self._num_queries = 0
        self._num_hits = 0
        self.num_rejected = 0

    @property
    def is_idle(self) -> bool:
        """Nothing to do now or later, unless a request arrives."""
        is_quiet = not self._incoming and not self._fetching and not self.parts.link.under_way
        return is_quiet and not self._has_work

    @property
    def _has_work(self) -> bool:
        return self._scheduler.has_work

    def submit(self, index: int, at_s: float, *, since_s: float | None = None) -> None:
        """Let a request arrive at a time; before `now`, it is seen with the next step.

        `since_s`: when its client began to wait, if that was before, at a replica that died.
        """
        self._record.arrival_s[index] = at_s if since_s is None else since_s
        heapq.heappush(self._incoming, (at_s, index))

    def run(self, until: float) -> None:
        """Run every step that starts before `until`; infinity runs until all is done."""
        while self.now < until:
            self._receive()
            if self._has_work and self._step():
                continue
            following = self._next_event()
            if following is None:
                assert not self._has_work or until < float("inf"), "requests wait for nothing"
            if following is None or following >= until:
                self.now = max(self.now, until) if until < float("inf") else self.now
                return
            self.now = max(self.now, following)

    def report(self) -> ReplicaReport:
        """Return what its metrics would say now."""
        ready = self.parts.accounts.residency.resident_ids()
        allocator = self.parts.accounts.allocator
        num_pages = allocator.num_held(PageUse.ADAPTER)
        mean_pages = num_pages / len(ready) if ready else 1.0
        return ReplicaReport(
            num_waiting=self._scheduler.num_waiting,
            ready=frozenset(ready),
            waited_for=self._scheduler.waiting_adapters(),
            max_adapters=int(allocator.num_pages / max(1.0, mean_pages)),
        )

    def counters(self) -> Counters:
        """Return what was counted so far."""
        scheduler, accounts, link = self._scheduler, self.parts.accounts, self.parts.link
        store = self.parts.store
        return Counters(
            num_steps=self._num_steps,
            busy_s=self._busy_s,
            num_preemptions=scheduler.num_preemptions,
            num_adapter_evictions=accounts.num_adapter_evictions,
            num_prefix_evictions=accounts.num_prefix_evictions,
            num_loads=link.num_loads,
            num_host_hits=link.num_host_hits,
            prefix_queries=scheduler.num_prefix_queries,
            prefix_hits=scheduler.num_prefix_hits,
            adapter_queries=self._num_queries,
            adapter_hits=self._num_hits,
            num_loaded_pages=link.num_loaded_pages,
            num_fetches=store.num_fetches if store else 0,
            fetched_bytes=store.fetched_bytes if store else 0.0,
        )

    # ---- one turn of the loop ------------------------------------------------------------------

    def _receive(self) -> None:
        """Hand over the loads and requests that have arrived by now."""
        scheduler, under_way = self._scheduler, self.parts.link.under_way
        while under_way and under_way[0].done_s <= self.now:
            arrival = under_way.popleft()
            scheduler.finish_load(arrival.adapter_id, arrival.took_s)
        while self._incoming and self._incoming[0][0] <= self.now:
            at_s, index = heapq.heappop(self._incoming)
            self._arrive(index, at_s)
        while self._fetching and self._fetching[0][0] <= self.now:
            self._queue(heapq.heappop(self._fetching)[1])
        self._book_events(scheduler.drop_hopeless(self.now))

    def _arrive(self, index: int, at_s: float) -> None:
        """Let a request in; one whose adapter's file is elsewhere waits for the file first."""
        manifest = self._book.manifest(int(self._book.trace.adapter[index]))
        if manifest is not None:
            found = self._find(manifest.adapter_id)
            self._record.found[index] = found
            self._num_queries += 1
            self._num_hits += found == Found.POOL
            if found == Found.COLD and self.parts.store is not None:
                num_bytes = self._sizes.of(manifest).num_pages * self.parts.page_bytes
                done_s = self.parts.store.fetch(manifest.adapter_id, num_bytes, at_s)
                heapq.heappush(self._fetching, (done_s, index))
                return
        self._queue(index)

    def _find(self, adapter_id: str) -> Found:
        if self._scheduler.is_resident(adapter_id):
            return Found.POOL
        return Found.HOST if self.parts.link.has_in_host(adapter_id) else Found.COLD

    def _queue(self, index: int) -> None:
        request = self._book.make(index, self._record.arrival_s[index])
        self._tokens[request.request_id] = self._book.answer(index)
        self._book_events(self._scheduler.add(request))

    def _next_event(self) -> float | None:
        """Return when something happens next by itself, if anything will."""
        under_way = self.parts.link.under_way
        times = [self._incoming[0][0]] if self._incoming else []
        times += [under_way[0].done_s] if under_way else []
        times += [self._fetching[0][0]] if self._fetching else []
        return min(times, default=None)

    def _step(self) -> bool:
        """Decide and run one step; False when there was nothing to compute."""
        plan = self._scheduler.schedule(self.now)
        if self.parts.blocking is None:
            self._start_loads(plan)
        elif plan.loads:
            self._wait_for_loads(plan, self.parts.blocking)
        if not plan.sequences:
            return False
        work, result = self._computed(plan)
        took_s = self.parts.roofline.work_s(work)
        self._scheduler.advance(plan)
        self.now += took_s
        self._busy_s += took_s
        self._num_steps += 1
        self._book_events(self._scheduler.commit(plan, result, took_s))
        if self.check is not None:
            self.check()
        return True

    def _start_loads(self, plan: Plan) -> None:
        link = self.parts.link
        for load in plan.loads:
            link.load(load.adapter.adapter_id, len(load.pages), self.now)
        for manifest in plan.prefetches:
            if not link.prefetch(manifest.adapter_id, self._sizes.of(manifest).num_pages, self.now):
                break

    def _wait_for_loads(self, plan: Plan, blocking: BlockingLoads) -> None:
        """Let the time of the needed loads pass, and undo the others."""
        needed = [load for load in plan.loads if blocking.is_needed(load.adapter.adapter_id)]
        for load in needed:
            arrival = self.parts.link.load(load.adapter.adapter_id, len(load.pages), self.now)
            self.now = arrival.done_s
        for load in plan.loads:
            if load not in needed:
                self.parts.accounts.residency.fail_load(load.adapter.adapter_id)
        if needed:
            blocking.loaded()

    def _computed(self, plan: Plan) -> tuple[StepWork, StepResult]:
        """Return what the step costs the device, and what it samples."""
        tokens: dict[str, SampledToken] = {}
        answers = self._tokens
        num_tokens = kv_tokens = 0
        attended = 0.0
        for step in plan.sequences:
            num, start = step.num_tokens, step.start
            num_tokens += num
            kv_tokens += start + num
            attended += num * (start + (num + 1) / 2)
            if step.is_sampled:
                request_id = step.request.request_id
                tokens[request_id] = answers[request_id]
        work = StepWork(num_tokens, len(tokens), kv_tokens, attended, self._adapter_pages(plan))
        return work, StepResult(tokens)

    def _adapter_pages(self, plan: Plan) -> int:
        """Return how many pages of adapters the step reads."""
        adapters = plan.adapters
        if self.parts.reads_adapters_per_row and plan.sequences[-1].num_tokens == 1:
            ids = [step.adapter_id for step in plan.sequences]
            return sum(len(adapters[i].pages) for i in ids if i is not None)
        return sum([len(adapter.pages) for adapter in adapters.values()])

    def _book_events(self, events: list[Event]) -> None:
        for event in events:
            request_id = event.request_id
            if event.finish_reason is None and request_id in self._begun:
                continue
            index = int(request_id)
            if isinstance(event, TokenEvent) and request_id not in self._begun:
                self._begun.add(request_id)
                self._record.first_s[index] = self.now
                self._record.num_cached[index] = event.num_cached
            if event.finish_reason is not None:
                self._end(index, request_id, is_answered=isinstance(event, TokenEvent))

    def _end(self, index: int, request_id: str, *, is_answered: bool) -> None:
        self._begun.discard(request_id)
        del self._tokens[request_id]
        self._record.num_ends[index] += 1
        self.ended_s.append(self.now)
        if is_answered:
            self._record.end_s[index] = self.now
            self._on_end(index, self.now)
        else:
            self.num_rejected += 1
            self._book.forget(index)
