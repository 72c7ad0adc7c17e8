"""The engine as a plain object: schedule, launch, commit. No process, no thread of its own.

Tests, the offline API and the engine process all drive this object. With `overlap`, a step is
committed only after the next one was launched, so that the device never waits for the host:

    host     schedule 1, launch 1 | schedule 2, launch 2, commit 1 | schedule 3, launch 3, commit 2
    device                          computes 1                       computes 2
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from loraplex_memory.accounts import PoolAccounts
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.allocator import PageUse
from loraplex_scheduler.errors import RequestRefused
from loraplex_scheduler.plan import EndEvent, Event, FinishReason, Plan, Request, TokenEvent
from loraplex_scheduler.scheduler import Scheduler
from loraplex_scheduler.vtc import FairQueue
from loraplex_server.engine.constraints import Constraints
from loraplex_server.engine.loader import AdapterLoader
from loraplex_server.engine.messages import TIERS, EngineInfo, EngineStats, FreedMemory
from loraplex_server.engine.runner import Flight, StepRunner
from loraplex_server.engine.step_meter import StepMeter, StepParts

_NO_GRAMMARS: Final = "this engine was built without a tokenizer, which grammars need"


class EngineCore:
    """Used from one thread. Every request given to `add` gets exactly one terminal event.

    Between steps at most one launched step is uncommitted, and without `overlap` none is.

    Args:
        overlap: schedule the next step while the runner computes one; for runners that do not
            compute on the host's cores.
        constraints: grammars of requests, which the runner asks for masks; None refuses them.
        parts: where the runner books its parts of a step, if it does.
        on_close: called last of all, to end what the runner computes with.
    """

    def __init__(
        self,
        *,
        info: EngineInfo,
        scheduler: Scheduler,
        runner: StepRunner,
        loader: AdapterLoader,
        accounts: PoolAccounts,
        clock: Callable[[], float] = time.monotonic,
        overlap: bool = False,
        constraints: Constraints | None = None,
        parts: StepParts | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.info = info
        self._on_close = on_close
        self._constraints = constraints
        self.scheduler = scheduler
        self._runner = runner
        self._loader = loader
        self._accounts = accounts
        self._clock = clock
        self._overlap = overlap
        self._in_flight: tuple[Plan, Flight] | None = None
        self._launched_at = 0.0
        self._landed_at = 0.0
        self._num_steps = 0
        self._meter = StepMeter(parts or StepParts())
        self._adapter_wants = dict.fromkeys(TIERS, 0)
        self._generated_tokens = 0
        self._step_s = 0.0
        self._is_waiting_for_loads = False

    @property
    def _num_waiting_for_grammars(self) -> int:
        return self._constraints.num_waiting if self._constraints is not None else 0

    @property
    def has_work(self) -> bool:
        """Some request has not ended yet, or some step or load has not been booked.

        Steps and loads outlive the requests that asked for them.
        """
        return (
            self.scheduler.has_work
            or self._loader.num_outstanding > 0
            or self._num_waiting_for_grammars > 0
        )

    @property
    def is_waiting_for_loads(self) -> bool:
        """The last step had nothing to compute: only a load, a grammar, a command or time can
        change that.
        """
        return self._is_waiting_for_loads

    def add(self, request: Request) -> list[Event]:
        """Accept a request, or return its terminal event when it can never run, or not in time."""
        if request.sampling.grammar is None:
            return self._queue(request)
        if self._constraints is None:
            return [EndEvent(request.request_id, FinishReason.REFUSED, _NO_GRAMMARS)]
        if self._constraints.knows(request.request_id):
            reason = f"request id {request.request_id} is in use"
            return [EndEvent(request.request_id, FinishReason.REFUSED, reason)]
        self._constraints.begin(request)
        return []

    def abort(self, request_id: str) -> list[Event]:
        """End a request now; no event when it has ended already."""
        if self._constraints is not None and self._constraints.forget(request_id):
            return [EndEvent(request_id, FinishReason.CANCELLED)]
        return self.scheduler.abort(request_id)

    def _queue(self, request: Request) -> list[Event]:
        for manifest, _ in request.adapters:
            self._adapter_wants[self._tier_of(manifest.adapter_id)] += 1
        try:
            return self.scheduler.add(request)
        except RequestRefused as error:
            return [EndEvent(request.request_id, FinishReason.REFUSED, error.reason)]

    def learn_tokens(self, tokenizer: str) -> None:
        """Compile grammars for this tokenizer, JSON of the `tokenizers` library."""
        if self._constraints is not None:
            self._constraints.compiler.learn_tokens(tokenizer)

    def prefetch(self, manifest: AdapterManifest) -> None:
        """Bring an adapter closer before anybody asks for it, if that costs nobody anything."""
        self.scheduler.prefetch(manifest)

    def discard_adapter(self, adapter_id: str) -> FreedMemory:
        """The adapter was deleted: forget it wherever nobody uses it.

        Returns:
            What it took until now; it is all free once `holds_adapter` says so.
        """
        residency, prefixes = self._accounts.residency, self._accounts.prefixes
        has_pages = residency.state(adapter_id) is not None
        freed = FreedMemory(
            weight_pages=len(residency.pages(adapter_id)) if has_pages else 0,
            prefix_pages=prefixes.pages_by_adapter().get(adapter_id, 0),
            host_bytes=self._loader.host_bytes_of(adapter_id),
        )
        self.scheduler.discard_adapter(adapter_id)
        self._loader.discard(adapter_id)
        return freed

    def holds_adapter(self, adapter_id: str) -> bool:
        """Whether anything of the adapter is in pool or host memory."""
        return (
            self._accounts.residency.state(adapter_id) is not None
            or adapter_id in self._accounts.prefixes.pages_by_adapter()
            or self._loader.holds(adapter_id)
        )

    def _tier_of(self, adapter_id: str) -> str:
        """Return how near an adapter is: `pool`, `loading`, `host` or `disk`."""
        residency = self._accounts.residency
        if residency.is_resident(adapter_id):
            return "pool"
        if residency.state(adapter_id) is not None:
            return "loading"
        return "host" if self._loader.host_bytes_of(adapter_id) else "disk"

    def keep_adapters(self, adapter_ids: frozenset[str]) -> None:
        """Let these leave the pool only where a request could not run otherwise."""
        self.scheduler.keep_adapters(adapter_ids)

    def step(self, load_timeout_s: float = 0.0) -> list[Event]:
        """Run one step and return what happened.

        Args:
            load_timeout_s: when nothing can be computed before an adapter is loaded, wait so long
                for it. 0 returns at once.
        """
        started = self._clock()
        timeout_s = load_timeout_s if self._is_waiting_for_loads else 0.0
        events = self._book_grammars(0.0 if self._loader.num_outstanding else timeout_s)
        events += self._expire(started)
        events += self._book_loads(timeout_s if self._loader.num_outstanding else 0.0)
        had_flight = self._in_flight is not None
        if self.scheduler.needs_known_tokens:
            events += self._land()
        now = self._clock()
        events += self.scheduler.drop_hopeless(now)
        plan = self.scheduler.schedule(now)
        # Before the launch, so that loads start early, and after the launch of the step before:
        # these pages may have been another's until now, and the loader has its copies wait for
        # what was launched by the time of `submit`. This plan touches none of them.
        for load in plan.loads:
            self._loader.submit(load)
        for manifest in plan.prefetches:  # most wanted first
            if not self._loader.prefetch(manifest):
                break
        schedule_s = self._clock() - now
        events += self._fly(plan)
        self._is_waiting_for_loads = not plan.sequences and not had_flight
        if not self._is_waiting_for_loads:
            took_s = self._clock() - started
            self._step_s += took_s
            self._meter.parts.schedule_s += schedule_s
            self._meter.took(took_s)
        if self._constraints is not None:
            for event in events:
                if event.finish_reason is not None:
                    self._constraints.forget(event.request_id)
        return events

    def stats(self) -> EngineStats:
        """Return a snapshot for metrics and for the pool's map."""
        accounts, scheduler, loader = self._accounts, self.scheduler, self._loader
        residency, allocator, prefixes = accounts.residency, accounts.allocator, accounts.prefixes
        queue = scheduler.waiting
        fair = queue if isinstance(queue, FairQueue) else None
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + self._num_waiting_for_grammars,
            pages_kv=allocator.num_held(PageUse.KV),
            pages_adapters=allocator.num_held(PageUse.ADAPTER),
            pages_free=allocator.num_free,
            pages_prefix_used=prefixes.num_nodes - prefixes.num_idle,
            pages_prefix_idle=prefixes.num_idle,
            resident={i: len(residency.pages(i)) for i in residency.resident_ids()},
            loading=tuple(residency.loading_ids()),
            running_adapters=tuple(sorted(scheduler.running_adapters())),
            waiting_adapters=tuple(sorted(scheduler.waiting_adapters())),
            prefix_pages_by_adapter={i or "": n for i, n in prefixes.pages_by_adapter().items()},
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_rejected=scheduler.num_rejections,
            num_loads=loader.num_loads,
            num_load_failures=loader.num_failures,
            num_prefetches=loader.num_prefetches,
            num_host_hits=loader.num_host_hits,
            load_s=loader.load_s,
            host_bytes=loader.host_bytes,
            host_capacity_bytes=loader.host_capacity_bytes,
            host_adapters=loader.host_adapters(),
            num_evictions=accounts.num_adapter_evictions,
            num_prefix_evictions=accounts.num_prefix_evictions,
            prefix_query_tokens=scheduler.num_prefix_queries,
            prefix_hit_tokens=scheduler.num_prefix_hits,
            prompt_tokens=self._meter.prefill_tokens,
            generated_tokens=self._generated_tokens,
            step_s=self._step_s,
            steps=self._meter.counts(),
            load_seconds=loader.load_seconds(),
            adapter_wants=dict(self._adapter_wants),
            evictions_by_cause={str(cause): n for cause, n in accounts.evictions.items()},
            fair_clients=fair.num_active if fair is not None else 0,
            fair_spread=fair.spread if fair is not None else 0.0,
        )

    def check(self) -> None:
        """Raise AssertionError if an invariant of the accounts is broken."""
        self.scheduler.check()

    def close(self) -> None:
        """Stop the loader's thread. A step in flight is dropped, with nobody left to tell."""
        self._in_flight = None
        if self._constraints is not None:
            self._constraints.close()
        self._loader.close()
        self._on_close()

    def _book_grammars(self, timeout_s: float) -> list[Event]:
        if self._constraints is None or not self._constraints.num_waiting:
            return []
        ready, events = self._constraints.poll(timeout_s)
        return events + [event for request in ready for event in self._queue(request)]

    def _expire(self, now: float) -> list[Event]:
        """End every request whose deadline has passed, wherever it waits."""
        events = self.scheduler.expire(now)
        if self._num_waiting_for_grammars:
            assert self._constraints is not None
            events += self._constraints.expire(now)
        return events

    def _book_loads(self, timeout_s: float) -> list[Event]:
        events: list[Event] = []
        for result in self._loader.poll(timeout_s):
            if result.error is None:
                self.scheduler.finish_load(result.adapter_id, result.took_s)
            else:
                events += self.scheduler.fail_load(result.adapter_id, result.error)
        return events

    def _fly(self, plan: Plan) -> list[Event]:
        """Launch a plan, unless it is empty; then commit what may no longer be in flight."""
        launched: tuple[Plan, Flight] | None = None
        if plan.sequences:
            launched_at = self._clock()
            launched = plan, self._launch(plan, launched_at)
            self.scheduler.advance(plan)
            self._num_steps += 1
            self._meter.launched(plan)
        events = self._land()
        if launched is not None:
            self._in_flight, self._launched_at = launched, launched_at
        if not self._overlap:
            events += self._land()
        return events

    def _launch(self, plan: Plan, now: float) -> Flight:
        """Launch a plan; what the runner did not book as computing was building the batch."""
        parts = self._meter.parts
        computing_s = parts.forward_s + parts.sample_s
        flight = self._runner.launch(plan)
        computing_s = parts.forward_s + parts.sample_s - computing_s
        parts.build_s += max(0.0, self._clock() - now - computing_s)
        return flight

    def _land(self) -> list[Event]:
        """Wait for the step in flight, if there is one, and commit it."""
        if self._in_flight is None:
            return []
        plan, flight = self._in_flight
        self._in_flight = None
        waiting_since = self._clock()
        result = flight.result()
        # A device takes up a step when it was launched and the one before it is done.
        started_at = max(self._launched_at, self._landed_at)
        self._landed_at = self._clock()
        parts = self._meter.parts
        parts.forward_s += self._landed_at - waiting_since
        took_s = self._landed_at - started_at
        events = self.scheduler.commit(plan, result, took_s, self._landed_at)
        parts.commit_s += self._clock() - self._landed_at
        self._generated_tokens += sum(isinstance(event, TokenEvent) for event in events)
        return events
